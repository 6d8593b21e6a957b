"""Runners that leave something to be delivered."""

from __future__ import annotations

import os
from pathlib import Path
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


class SpoolRunner(Runner):
    """Leaves in its spool folder, under `spec.name`, bytes (in which `ATTEMPT` is its number) or what is no file.

    With `spec.then` it ends without an outcome of the child's own.
    """

    def run(self, ctx: Context) -> dict[str, Any]:
        attempt = str(ctx.job.attempt)
        spool = Path(ctx.job.tmp_dir).parents[1] / "spool" / attempt
        path = spool / ctx.spec["name"]
        match ctx.spec["left"]:
            case "a pipe":
                os.mkfifo(path)
            case "a folder":
                (path / "in it").mkdir(parents=True)
            case "a link":
                path.with_name("elsewhere").write_text(f'{{"attempt": {attempt}, "ok": true}}')
                path.symlink_to("elsewhere")
            case text:
                path.write_text(text.replace("ATTEMPT", attempt))
        spool.chmod(0o777)
        if ctx.spec.get("then") == "exit":
            os._exit(0)
        return {"ok": True}


class LinkRunner(Runner):
    """Once its folder has a file `go`: a link of `spec.name` there to `spec.target`."""

    def run(self, ctx: Context) -> dict[str, Any]:
        while not (ctx.out_dir / "go").exists():
            ctx.sleep(0.02)
        (ctx.out_dir / ctx.spec["name"]).symlink_to(ctx.spec["target"])
        return {"ok": True}


class OutcomeRunner(Runner):
    """Leaves the bytes of `spec.outcome` (in Latin-1) where the child's outcome belongs."""

    def run(self, ctx: Context) -> dict[str, Any]:
        head = b'{"attempt": %d, "ok": true, "result": ' % ctx.job.attempt
        spool = Path(ctx.job.tmp_dir).parents[1] / "spool" / str(ctx.job.attempt)
        (spool / "outcome.json").write_bytes(head + ctx.spec["outcome"].encode("latin-1") + b"}")
        os._exit(0)
