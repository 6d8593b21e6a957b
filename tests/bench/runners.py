"""Runners that the benchmark registers."""

from __future__ import annotations

import os
import time
from typing import Any

from runners.api import Context, Runner


class BurnRunner(Runner):
    """Keeps `processes` processes busy for `seconds`."""

    def run(self, ctx: Context) -> dict[str, Any]:
        end = time.monotonic() + ctx.spec["seconds"]
        for _ in range(ctx.spec["processes"] - 1):
            if os.fork() == 0:
                while time.monotonic() < end:
                    pass
                os._exit(0)
        while time.monotonic() < end:
            pass
        return {"ok": True}
