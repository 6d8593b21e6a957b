"""A minute of matrix products: the energy counter against the integral of power, and what the task is charged."""

from __future__ import annotations

import itertools
import time

from flowmesh.node.devices import GpuSample
from tests.gpu.kit.scene import Scene

SECONDS, DRY_SECONDS = 60.0, 3.0
SETTLE_S, DRY_SETTLE_S = 2.0, 0.0
"""The driver averages power over up to a second: none of that from before the load."""
RESERVE_S = 8.0
EXACT_S = 0.03
TOLERANCE = 0.02


def run(scene: Scene) -> None:
    _ = scene.node  # started first
    settle_s = DRY_SETTLE_S if scene.dry else SETTLE_S
    seconds = DRY_SECONDS if scene.dry else min(SECONDS, scene.left_s - settle_s - RESERVE_S)
    begin = scene.sample()
    task = scene.dispatch("burn", seconds=seconds + settle_s + 0.5)
    scene.wait_phase(task, "burning")
    time.sleep(settle_s)
    looks = measure(scene, seconds)
    found = scene.result(task)
    end = scene.sample()
    (first_s, first), (last_s, last) = looks[0], looks[-1]
    if first.energy_mj is None or last.energy_mj is None or first.power_w is None:
        scene.skip("energy counter against the integral of power", "this GPU has no energy counter, or no power")
        return
    counted_j = (last.energy_mj - first.energy_mj) / 1000
    integral_j = sum(
        ((before.power_w or 0) + (after.power_w or 0)) / 2 * (at_s - before_s)
        for (before_s, before), (at_s, after) in itertools.pairwise(looks)
    )
    off = integral_j / counted_j - 1 if counted_j else 1.0
    scene.row(
        f"integral of power over {last_s - first_s:.0f} s of matrix products against the energy counter",
        ok=abs(off) <= TOLERANCE,
        value=f"{integral_j:.0f} J ({off:+.1%}), {len(looks)} readings",
        against=f"{counted_j:.0f} J",
        aim="within 2 %",
        why="" if abs(off) <= TOLERANCE else f"off by {off:+.2%}",
        evidence={"readings (s, W, J)": "\n".join(_line(*each) for each in looks[:: max(1, len(looks) // 60)])},
    )
    whole_j = ((end.energy_mj or 0) - (begin.energy_mj or 0)) / 1000
    charged_j = (scene.end_of(task)["payload"].get("energy") or {}).get("gpu_joules")
    if charged_j is None:
        scene.row("the task's energy against the counter", ok=False, why="the task's event has no gpu_joules")
    else:
        scene.timing(
            "the task's energy against the counter, from its dispatch to its end",
            ok=0.95 <= charged_j / whole_j <= 1.01,
            value=f"{charged_j:.0f} J",
            against=f"{whole_j:.0f} J",
            aim="95 to 101 %",
        )
    powers = [look.power_w or 0 for _, look in looks]
    hot = {reason for _, look in looks for reason in look.throttled}
    shown = f"{sum(powers) / len(powers):.0f} W, {found['flop'] / 1e12 / (seconds + settle_s + 0.5):.0f} TFLOP/s"
    scene.row("power and speed meanwhile", ok=None, value=shown, why=f"throttled: {sorted(hot)}" if hot else "")


def measure(scene: Scene, seconds: float) -> list[tuple[float, GpuSample]]:
    """Readings ten times a second, each with the middle of the time that it took; those that took long are left out."""
    found: list[tuple[float, float, GpuSample]] = []
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at or len(found) < 2:
        asked_s = time.monotonic()
        look = scene.sample()
        took_s = time.monotonic() - asked_s
        found.append((took_s, asked_s + took_s / 2, look))
        time.sleep(max(0.0, 0.1 - took_s))
    exact = [(at_s, look) for took_s, at_s, look in found if took_s < EXACT_S]
    return exact if len(exact) > len(found) / 2 else [(at_s, look) for _, at_s, look in found]


def _line(at_s: float, look: GpuSample) -> str:
    return f"{at_s:.2f} {look.power_w} {(look.energy_mj or 0) / 1000:.1f}"
