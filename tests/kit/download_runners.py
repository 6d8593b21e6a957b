"""A runner that downloads, and looks for the node's token wherever a task can look."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from runners.api import Context, Runner, RunnerError
from runners.data.download import fetch


class DownloadRunner(Runner):
    """Fetches each of `spec.urls`: {name: {"url", "headers"?}}; its result has a text or an error for each.

    `spec.nekot` is the token backwards. Waits for the file `spec.wait` first, where it is given.
    """

    def run(self, ctx: Context) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, asked in ctx.spec.get("urls", {}).items():
            if wait := ctx.spec.get("wait"):
                (ctx.out_dir / "waiting").touch()
                while not Path(wait).exists():
                    ctx.sleep(0.05)
            try:
                file = fetch(ctx, asked["url"], f"urls.{name}", headers=asked.get("headers"))
                found[name] = {"text": file.path.read_text()}
            except RunnerError as error:
                found[name] = {"error": str(error), "fault": error.fault.value}
        spool = Path(ctx.job.tmp_dir).parents[1] / "spool" / str(ctx.job.attempt)
        places = [Path("/proc/self/environ"), spool / "job.json"]
        gateway = Path(ctx.job.gateway.socket).parent if ctx.job.gateway else None
        if gateway is not None:
            with contextlib.suppress(PermissionError):
                places += [path for path in gateway.iterdir() if path.is_file()]
        seen = list(os.environ.values())
        for path in places:
            with contextlib.suppress(PermissionError):
                seen.append(path.read_text())
        return {"found": found, "sees_token": any(ctx.spec["nekot"][::-1] in text for text in seen)}
