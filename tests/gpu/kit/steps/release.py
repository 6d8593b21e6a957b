"""A task that holds 20, then 60 GB is killed, again and again: each time its memory is proven to be back."""

from __future__ import annotations

import os
import signal
import time

from tests.gpu.kit.scene import MIB, Scene, percentiles
from tests.kit.support import alive, until

SIZES = (20e9, 60e9)
LEAST, MOST = 10, 100
DRY = 3
RESERVE_S = 3.0


def run(scene: Scene) -> None:
    _ = scene.node  # started first
    for number, size in enumerate(SIZES):
        until_s = time.monotonic() + (scene.left_s - RESERVE_S) / (len(SIZES) - number)
        held = scene.size(size)
        released_s: list[float] = []
        problem = ""
        most, least = (DRY, DRY) if scene.dry else (MOST, LEAST)
        while len(released_s) < most and time.monotonic() < until_s and not problem:
            problem = once(scene, held, released_s)
        if not problem and len(released_s) < least:
            problem = f"only {len(released_s)} fitted into the step's time"
        what = f"SIGKILL of a task with {held / 1e9:.0f} GB: release proven, no process left"
        scene.row(what, ok=not problem, value=f"{len(released_s)} times", aim=f"{least} to {most} times", why=problem)
        if released_s:
            scene.row("the same, until the release was proven: p50 / p99", ok=None, value=percentiles(released_s))


def once(scene: Scene, size: int, released_s: list[float]) -> str:
    """Hold, kill, and look. Returns what was wrong."""
    before = scene.sample()
    task = scene.dispatch("hold", bytes=size)
    scene.wait_phase(task, "holding")
    during = scene.sample()
    if during.used_bytes < before.used_bytes + size:
        return f"NVML shows {during.used_bytes / MIB:.0f} MiB while a task holds {size / MIB:.0f} MiB"
    pid = scene.node.task_pid(task)
    os.kill(pid, signal.SIGKILL)
    end = scene.end_of(task)
    resources = end["payload"].get("resources") or {}
    if end["type"] != "TASK_FAILED":
        return f"the killed task ended as {end['type']}"
    if "gpu_release_ms" not in resources:
        return f"the node could not prove the release: {resources.get('gpu_held') or resources}"
    released_s.append(resources["gpu_release_ms"] / 1000)
    after = scene.sample()
    if after.used_bytes > before.used_bytes + 64 * MIB:
        return f"the node says released, and NVML shows {(after.used_bytes - before.used_bytes) / MIB:.0f} MiB more"
    if after.pids - before.pids:
        return f"the node says released, and NVML lists {sorted(after.pids - before.pids)}"
    until(lambda: not alive(pid), "the killed process has gone", 5)
    return ""
