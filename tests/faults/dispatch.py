"""What the orchestrator may send: duplicates, early cancels, garbage, many at once."""

from __future__ import annotations

import json
import random

from tests.faults.rig import END_S, Lost, Rig
from tests.faults.table import fault, until


@fault("dispatch: each message twice")
def _(rig: Rig, rng: random.Random) -> None:
    for _ in range(3):
        when = f"2026-01-01T00:00:{rng.randint(10, 59)}+00:00"
        spec = {"taskType": "echo", "delaySec": rng.uniform(0, 0.1)}
        task_id = rig.dispatch(spec, dispatched_at=when)
        rig.pause(rng, 0.2)
        rig.dispatch(spec, task_id=task_id, dispatched_at=when)


@fault("dispatch: cancel before its task, both twice")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = f"early-{rng.getrandbits(48):x}"
    when = "2026-01-01T00:00:00+00:00"
    word = json.dumps({"type": "CANCEL", "task_id": task_id})
    for _ in range(2):
        rig.peer.redis.publish("flowmesh.control", word)
    for _ in range(2):
        rig.dispatch({"taskType": "echo"}, "cancelled", task_id=task_id, dispatched_at=when)


@fault("dispatch: garbage and messages for others")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_task(rng)
    for _ in range(20):
        junk = rng.randbytes(rng.randint(0, 3000))
        rig.peer.redis.publish(
            "tasks",
            rng.choice(
                [
                    junk,
                    b'{"assigned_worker": "w1", "task_id": "' + junk[:20].hex().encode(),
                    b'{"assigned_worker":"w2"}',
                ]
            ),
        )
        rig.peer.redis.publish("flowmesh.control", junk)
    rig.some_task(rng)


UNREADABLE = {
    "nan": json.dumps({"x": float("nan")}),
    "infinity": json.dumps({"x": [float("-inf")]}),
    "half": json.dumps({"x": "\ud800"}),
    "deep": '{"x": ' + "[" * 5000 + "]" * 5000 + "}",
    "bytes": '{"x": "\udcff"}',
}
"""Specs that no decoder accepts, as they are sent."""


@fault("dispatch: unreadable ones between good ones")
def _(rig: Rig, rng: random.Random) -> None:
    refused = []
    for name in rng.sample(sorted(UNREADABLE), len(UNREADABLE)):
        rig.some_task(rng)
        task_id = f"{name}-{rng.getrandbits(48):x}"
        message = {"task_id": task_id, "assigned_worker": rig.node.worker_id, "task": {"spec": "SPEC"}}
        text = json.dumps(message).replace('"SPEC"', UNREADABLE[name])
        rig.peer.redis.publish("tasks", text.encode(errors="surrogateescape"))
        refused.append(task_id)
        rig.pause(rng, 0.2)
    rig.some_task(rng)
    for task_id in [*refused, *rig.tasks]:
        until(lambda task_id=task_id: rig.peer.ends(task_id), f"the end of {task_id}", END_S)
    for task_id in refused:
        kinds = [event["payload"].get("error_kind") for event in rig.peer.of_task(task_id)]
        if kinds != ["bad_request"]:
            raise Lost(f"{task_id} was answered with {kinds}")


@fault("dispatch: thirty at once, a third cancelled", weight=3)
def _(rig: Rig, rng: random.Random) -> None:
    ids = [rig.dispatch({"taskType": "echo", "delaySec": 0.01}) for _ in range(30)]
    for task_id in rng.sample(ids, 10):
        rig.tasks[task_id].add("cancelled")
        rig.node.ask(op="cancel", task_id=task_id, force=rng.random() < 0.5)
