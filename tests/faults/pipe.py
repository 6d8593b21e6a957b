"""Faults in what a task says: on its pipe, and in its log."""

from __future__ import annotations

import random

from tests.faults.rig import Lost, Rig
from tests.faults.table import fault


@fault("pipe: garbage")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("garbage")


@fault("pipe: truncated frames")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("truncated")


@fault("pipe: a frame of 100 MB")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("huge_frame")


@fault("pipe: frames as fast as they go")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("flood_pipe", seconds=rng.uniform(0.2, 1.5))


@fault("pipe: closed by the child")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("close_pipe")


@fault("pipe: child stops reading, node keeps talking")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.do("deaf", "cancelled")
    rig.child(task_id)
    for _ in range(20):
        rig.node.ask(op="cancel", task_id=task_id)


@fault("logs: a flood of 20 MB")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.do("log_flood", megabytes=20)
    rig.peer.wait_end(task_id)
    log = rig.node.results_dir / task_id / "logs" / "stdout.log"
    if log.exists() and log.stat().st_size > 2 * 1024 * 1024:
        raise Lost(f"the task's log has {log.stat().st_size} bytes; the limit is 1 MiB")
