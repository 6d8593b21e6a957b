"""How late heartbeats are while the GPU and all CPUs are busy."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time

from tests.gpu.kit.scene import BEAT_S, Scene

SECONDS, DRY_SECONDS = 12.0, 2.2
LATE_S = 1.0
BURN = "import sys, time\nend = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"


def run(scene: Scene) -> None:
    _ = scene.node
    seconds = DRY_SECONDS if scene.dry else min(SECONDS, scene.left_s - 5)
    task = scene.dispatch("burn", seconds=seconds + 0.5)
    scene.wait_phase(task, "burning")
    busy = 1 if scene.dry else os.cpu_count() or 1
    burners = [subprocess.Popen([sys.executable, "-c", BURN, str(seconds)]) for _ in range(busy)]
    try:
        scene.peer.hear(0.0)
        del scene.peer.beats_heard_s[:-1]
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            scene.peer.hear(0.01)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    scene.result(task)
    late = sorted(after - before - BEAT_S for before, after in itertools.pairwise(scene.peer.beats_heard_s))
    assert late, f"no two heartbeats in {seconds:.0f} s"
    scene.timing(
        f"heartbeats of {BEAT_S:.0f} s with the GPU and {busy} CPUs busy: how late, p50 / worst",
        ok=late[-1] < LATE_S,
        value=f"{late[len(late) // 2] * 1000:.0f} / {late[-1] * 1000:.0f} ms, {len(late)} intervals",
        aim=f"under {LATE_S * 1000:.0f} ms",
    )
