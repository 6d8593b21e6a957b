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


class CountRunner(Runner):
    """Counts in `processes` processes for `seconds`; its result has the sum."""

    def run(self, ctx: Context) -> dict[str, Any]:
        end = time.monotonic() + ctx.spec["seconds"]
        read, write = os.pipe()
        for _ in range(ctx.spec["processes"]):
            if os.fork() == 0:
                os.write(write, b"%d\n" % self._count(end))
                os._exit(0)
        os.close(write)
        ctx.sleep(ctx.spec["seconds"])
        with os.fdopen(read) as counts:
            return {"ok": True, "count": sum(map(int, counts))}

    @staticmethod
    def _count(end: float) -> int:
        count = 0
        while time.monotonic() < end:
            count += 1
        return count
