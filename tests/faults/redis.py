"""Faults of Redis."""

from __future__ import annotations

import random
import signal

from tests.faults.rig import Lost, Rig
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


@fault("Redis: the reader of tasks.events goes away, comes back", weight=6)
def _(rig: Rig, rng: random.Random) -> None:
    def some() -> list[str]:
        return [rig.dispatch({"taskType": "echo", "delaySec": rng.uniform(0, 0.1)}) for _ in range(rng.randint(1, 6))]

    tasks = some()
    for _ in range(rng.randint(1, 2)):
        rig.listen(rng)
        rig.peer._pubsub.unsubscribe("tasks.events")
        until(lambda: rig.peer.redis.pubsub_numsub("tasks.events")[0][1] == 0, "nobody listens")
        tasks += some()
        rig.pause(rng, 1.5)
        rig.peer._pubsub.subscribe("tasks.events")
        tasks += some()
    for task_id in tasks:
        until(lambda task_id=task_id: rig.peer.ends(task_id), f"the end of {task_id}")
    heard = [event for event in rig.peer.task_events if event["task_id"] in tasks]
    for kind in ("TASK_STARTED", "TASK_SUCCEEDED"):
        if (order := [event["task_id"] for event in heard if event["type"] == kind]) != tasks:
            raise Lost(f"{kind}: {len(order)} for {len(tasks)} tasks, or in another order: {order}")
    # The next task may start before the last one's end is told; what was told first comes first all the same.
    if (times := [event["ts"] for event in heard]) != sorted(times):
        raise Lost(f"events are out of order: {times}")
