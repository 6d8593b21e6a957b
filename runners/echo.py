"""Task type `echo`: returns its own spec, after an optional delay. For probes, benchmarks and first steps."""

from __future__ import annotations

from typing import Any

from runners.api import BadRequest, Context, Runner
from runners.fields import COMMON, near

TICK_S = 0.1
KNOWN = (*COMMON, "delaySec")
"""Any other field is returned, and so is none without effect."""


class EchoRunner(Runner):
    def run(self, ctx: Context) -> dict[str, Any]:
        for name in ctx.spec:
            if name not in KNOWN and (meant := near(str(name), KNOWN)):
                raise BadRequest(f"spec.{name}: unknown field; did you mean {meant!r}?")
        delay_s = ctx.spec.get("delaySec", 0)
        if isinstance(delay_s, bool) or not isinstance(delay_s, int | float) or not 0 <= delay_s <= 86400:
            raise BadRequest(f"spec.delaySec: expected a number of seconds from 0 to 86400, found {delay_s!r}")
        if delay_s:
            ctx.phase("wait")
            waited = 0.0
            while waited < delay_s:
                tick = min(TICK_S, delay_s - waited)
                ctx.sleep(tick)
                waited += tick
                ctx.progress(round(waited, 3), delay_s, "s")
        return {"ok": True, "echo": ctx.spec}
