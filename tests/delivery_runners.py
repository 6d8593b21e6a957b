"""Runners that leave something to be delivered."""

from __future__ import annotations

import os
from typing import Any

from runners.api import Context, Runner


class ModelRunner(Runner):
    """A model of `spec.kilobytes` that does not compress, and a checkpoint beside it."""

    def run(self, ctx: Context) -> dict[str, Any]:
        for name in ("final_model", "checkpoints"):
            folder = ctx.out_dir / name
            folder.mkdir(exist_ok=True)
            (folder / "weights.bin").write_bytes(os.urandom(1024 * ctx.spec.get("kilobytes", 2000)))
        ctx.archive("final_model")
        return {"ok": True}


class FillRunner(Runner):
    """Fills the disk that `spec.where` is on, in the library's own words or in ours."""

    def run(self, ctx: Context) -> dict[str, Any]:
        folder = ctx.tmp_dir if ctx.spec["where"] == "tmp" else ctx.out_dir
        with open(folder / "filler", "wb", buffering=0) as file:
            while True:
                try:
                    file.write(b"\0" * 4096)
                except OSError:
                    if ctx.spec.get("then") == "succeed":
                        return {"ok": True}
                    raise
