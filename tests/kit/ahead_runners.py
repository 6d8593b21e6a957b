"""A runner with something to prepare: files of this node, and downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runners.api import Context, Preparation, Runner
from runners.data.download import fetch


class ReadingRunner(Runner):
    """Reads `spec.paths` and `spec.urls`; its result has the first bytes of each."""

    def ahead(self, ctx: Context) -> list[Preparation]:
        if ctx.spec.get("refuses"):
            raise ValueError("a fault of the runner itself")
        return [
            *(lambda path=path: [Path(path)] for path in ctx.spec.get("paths", [])),
            *(lambda url=url: [fetch(ctx, url, "spec.urls").path] for url in ctx.spec.get("urls", [])),
        ]

    def run(self, ctx: Context) -> dict[str, Any]:
        paths = [Path(path) for path in ctx.spec.get("paths", [])]
        paths += [fetch(ctx, url, "spec.urls").path for url in ctx.spec.get("urls", [])]
        return {"ok": True, "begins": [path.read_bytes()[:8].decode() for path in paths]}
