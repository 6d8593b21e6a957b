"""Task type `echo`: returns its own spec, after an optional delay. For probes, benchmarks and first steps."""

from __future__ import annotations

from typing import Any

from runners.api import BadRequest, Context, Runner
from runners.fields import COMMON, Faults, check_resources, near

TICK_S = 0.1
KNOWN = (*COMMON, "delaySec")
"""Any other field is returned, and so is none without effect."""


class EchoRunner(Runner):
    def run(self, ctx: Context) -> dict[str, Any]:
        delay_s = read_delay(ctx)
        if delay_s:
            ctx.phase("wait")
            waited = 0.0
            while waited < delay_s:
                tick = min(TICK_S, delay_s - waited)
                ctx.sleep(tick)
                waited += tick
                ctx.progress(round(waited, 3), delay_s, "s")
        gang = ctx.job.gang
        place = {} if gang is None else {"rank": gang.rank, "size": gang.size}
        return {"ok": True, "echo": ctx.spec, **place}


def read_delay(ctx: Context) -> float:
    """Check the document; returns its delay in seconds.

    Raises:
        BadRequest: naming all fields that are wrong.
    """
    faults, spec = Faults(), ctx.spec
    faults.read(lambda: check_resources(ctx, spec.get("resources"), "spec.resources"))
    for name in spec:
        faults.read(lambda name=name: _check_name(str(name)))  # type: ignore[misc]
    delay_s = faults.read(lambda: _delay(spec.get("delaySec", 0)))
    faults.check()
    assert delay_s is not None, "else it was a fault"
    return delay_s


def _check_name(name: str) -> None:
    if name not in KNOWN and (meant := near(name, KNOWN)):
        raise BadRequest(f"spec.{name}: unknown field; did you mean {meant!r}?")


def _delay(delay_s: Any) -> float:
    if isinstance(delay_s, bool) or not isinstance(delay_s, int | float) or not 0 <= delay_s <= 86400:
        raise BadRequest(f"spec.delaySec: expected a number of seconds from 0 to 86400, found {delay_s!r}")
    return delay_s
