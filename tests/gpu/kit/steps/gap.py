"""The gap between two tasks of one slot, beyond what the next task needs for itself."""

from __future__ import annotations

import itertools

from tests.gpu.kit.scene import Scene, percentiles

TASKS, DRY_TASKS = 8, 3
BYTES = 4 << 30
AIM_S = 1.0


def run(scene: Scene) -> None:
    _ = scene.node  # started first
    count = DRY_TASKS if scene.dry else TASKS
    tasks = [scene.dispatch("load", bytes=scene.size(BYTES)) for _ in range(count)]  # they wait for each other
    found = sorted((scene.result(task) for task in tasks), key=lambda each: each["entered_at"])
    gaps_s = [after["entered_at"] - before["left_at"] for before, after in itertools.pairwise(found)]
    loads_s = [each["load_s"] for each in found]
    scene.timing(
        "end of a task's work → begin of the next one's in the same slot (release, result, fork): p50 / p99",
        ok=sorted(gaps_s)[len(gaps_s) // 2] < AIM_S,
        value=percentiles(gaps_s),
        against=f"{percentiles(loads_s)} to create the context and load {BYTES / 1e9:.0f} GB",
        aim=f"p50 under {AIM_S:.0f} s",
    )
