"""A task with something to see in `flowmesh top`: phases, progress, a loss or a rate. It ends when its test says so."""

from __future__ import annotations

import math
from typing import Any

from runners.api import PROGRESS_INTERVAL_S, Context, Runner

FRAMES = 10
PAUSE_S = 1.1 * PROGRESS_INTERVAL_S


class ShownRunner(Runner):
    """`spec.shown`: {phase, total, done, unit, loss: [from, to], tokens_per_s, log, fail}; runs until `go` is there."""

    def run(self, ctx: Context) -> dict[str, Any]:
        shown = ctx.spec.get("shown", {})
        ctx.phase(shown.get("phase", "train"))
        for line in shown.get("log", ()):
            print(line, flush=True)
        done, total = shown.get("done", 0), shown.get("total")
        for part in range(1, FRAMES + 1) if done else ():
            step = done * part // FRAMES
            metrics = {}
            if "loss" in shown:
                first, last = shown["loss"]
                metrics["loss"] = last + (first - last) * math.exp(-4 * step / (total or done)) * (
                    1 + 0.06 * (part % 3)
                )
            if "tokens_per_s" in shown:
                metrics["tokens_per_s"] = shown["tokens_per_s"] * (1 + 0.1 * math.sin(part))
            ctx.progress(step, total, shown.get("unit", "steps"), **metrics)
            ctx.sleep(PAUSE_S)
        (ctx.out_dir / "shown").touch()
        while not (ctx.out_dir / "go").exists():
            ctx.sleep(0.05)
        if "fail" in shown:
            raise RuntimeError(shown["fail"])
        return {"ok": True}
