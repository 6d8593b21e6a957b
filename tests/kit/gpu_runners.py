"""Runners and a canary for nodes whose GPUs are the stub's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from runners.api import Context, Runner


class LookRunner(Runner):
    """Says what it was given, does what `spec.then` says, and waits for `out_dir/go` where `spec.wait` is set."""

    def run(self, ctx: Context) -> dict[str, Any]:
        found = {
            "gpus": list(ctx.gpus),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "cpus": sorted(os.sched_getaffinity(0)),
            "threads": ctx.threads,
        }
        ctx.phase("ready")
        if ctx.spec.get("burn"):
            code = "import sys\nx = 0\nwhile x < 3_000_000: x += 1\nopen(sys.argv[1], 'wb').write(b'x' * (4 << 20))"
            subprocess.run([sys.executable, "-c", code, str(ctx.out_dir / "junk")], check=True)
        while ctx.spec.get("wait") and not (ctx.out_dir / "go").exists():
            ctx.sleep(0.02)
        match ctx.spec.get("then"):
            case "raise":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
        return {"ok": True, **found}


def canary(_pipe: object, spool: Path) -> int:
    """Ends as the file `canary` in the node's folder says."""
    verdict = (spool.parents[2] / "canary").read_text()
    with open(spool.parents[2] / "canaries", "a") as file:
        file.write(f"{verdict} {os.environ['CUDA_VISIBLE_DEVICES']}\n")
    return 0 if verdict == "good" else 3
