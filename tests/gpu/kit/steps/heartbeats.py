"""How late heartbeats are while the GPU and all CPUs are busy."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time

from tests.gpu.kit.scene import BEAT_S, Scene

SECONDS, DRY_SECONDS = 12.0, 3.2
LATE_S = 1.0
BURN = "import sys, time\nend = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"


def run(scene: Scene) -> None:
    seconds = DRY_SECONDS if scene.dry else min(SECONDS, scene.left_s - 5)
    task = scene.dispatch("burn", seconds=seconds + 0.5)
    scene.wait_phase(task, "burning")
    busy = 0 if scene.dry else os.cpu_count() or 1  # a dry run shares its machine with other tests
    burners = [subprocess.Popen([sys.executable, "-c", BURN, str(seconds)]) for _ in range(busy)]
    heard_s: list[float] = []
    try:
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            del scene.peer.worker_events[:]
            scene.peer.hear(0.01)
            events = scene.peer.worker_events
            if any(each["type"] == "HEARTBEAT" and each["worker_id"] == scene.worker for each in events):
                heard_s.append(time.monotonic())
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    scene.result(task)
    late = sorted(after - before - BEAT_S for before, after in itertools.pairwise(heard_s))
    assert late, f"no two heartbeats in {seconds:.0f} s"
    scene.timing(
        f"heartbeats of {BEAT_S:.0f} s with the GPU and {busy} CPUs busy: how late, p50 / worst",
        ok=late[-1] < LATE_S,
        value=f"{late[len(late) // 2] * 1000:.0f} / {late[-1] * 1000:.0f} ms, {len(late)} intervals",
        aim=f"under {LATE_S * 1000:.0f} ms",
    )
