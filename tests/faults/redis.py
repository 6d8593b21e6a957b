"""Faults of Redis."""

from __future__ import annotations

import random
import signal

from tests.faults.rig import Rig
from tests.faults.table import crashes, fault, until


@fault("Redis: SIGKILL, started again empty", weight=6)
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    crashes(rig)
    rig.pause(rng)
    rig.swap_redis(rng)


@fault("Redis: SIGSTOP, SIGCONT", weight=6)
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    crashes(rig)
    rig.pause(rng)
    assert rig.server.process is not None
    rig.hit(rig.server.process.pid, signal.SIGSTOP)
    rig.pause(rng, 3.0)
    rig.hit(rig.server.process.pid, signal.SIGCONT)


@fault("Redis: FLUSHDB")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.pause(rng)
    rig.peer.redis.flushdb()
    key = f"worker:{rig.node.worker_id}"
    until(lambda: rig.peer.redis.exists(key), "the node registers again")


@fault("Redis: slow (CLIENT PAUSE)")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.may_be_late = True
    rig.pause(rng)
    rig.peer.redis.execute_command("CLIENT", "PAUSE", rng.randint(100, 1500))


@fault("Redis: cuts every connection")
def _(rig: Rig, rng: random.Random) -> None:
    ids = rig.some_tasks(rng)
    for task_id in ids:
        until(lambda task_id=task_id: rig.peer.of_task(task_id), "the task has started")
    crashes(rig)
    rig.peer.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
