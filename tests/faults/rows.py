"""Kills among a task's rows, and its retry with the same id: it takes over each row that stands."""

from __future__ import annotations

import random
import signal
from typing import Any

from flowmesh.messages.rows import Kept, read
from tests.faults.rig import Lost, Rig
from tests.faults.table import KILLED, crashes, fault, until

COUNT = 60


def _kept(rig: Rig, task_id: str) -> Kept:
    try:
        with open(rig.node.results_dir / task_id / "rows.jsonl", "rb") as file:
            return read(file)
    except FileNotFoundError:
        return Kept()


def _begin(rig: Rig, rng: random.Random) -> tuple[str, int | None]:
    task_id = rig.dispatch(_spec(), *KILLED)
    pid = rig.child(task_id)
    rig.pause(rng, 0.6)
    return task_id, pid


def _spec() -> dict[str, Any]:
    return {"taskType": "rows", "count": COUNT, "row_s": 0.01}


def _check_retry(rig: Rig, task_id: str) -> None:
    rig.check()
    stood = _kept(rig, task_id)
    (end, *_) = rig.peer.ends(task_id)
    if end["type"] == "TASK_FAILED" and stood.head is not None:
        told, wanted = end["payload"].get("rows"), {"done": len(stood.current), "total": COUNT}
        if told != wanted:
            raise Lost(f"the event says rows {told}, and {wanted} are on disk")
    rig.peer.hear(0.05)
    rig.peer.task_events.clear()
    rig.dispatch(_spec(), task_id=task_id)
    rig.check()
    rows, result = _kept(rig, task_id).rows, rig.node.result(task_id)
    if rows[: len(stood.rows)] != stood.rows or result["reused"] != len(stood.rows):
        raise Lost(f"{len(stood.rows)} rows stood, and the retry took over {result['reused']}")
    if [row.index for row in rows] != list(range(COUNT)) or [each["index"] for each in result["items"]] != list(
        range(COUNT)
    ):
        raise Lost(f"{len(rows)} rows of {COUNT} after the retry, or in another order")


@fault("rows: SIGKILL of the child, then a retry")
def _(rig: Rig, rng: random.Random) -> None:
    task_id, pid = _begin(rig, rng)
    rig.hit(pid, signal.SIGKILL)
    _check_retry(rig, task_id)


@fault("rows: SIGKILL of the supervisor and the child, then a retry")
def _(rig: Rig, rng: random.Random) -> None:
    task_id, pid = _begin(rig, rng)
    crashes(rig)
    if rng.random() < 0.5:
        rig.hit(pid, signal.SIGKILL)
    rig.node.kill()
    rig.hit(pid, signal.SIGKILL)
    rig.start_node()
    until(
        lambda: rig.node.text().rpartition("node started:")[2].count("subscribed"), "the new supervisor is subscribed"
    )
    _check_retry(rig, task_id)


@fault("rows: cancelled, then a retry")
def _(rig: Rig, rng: random.Random) -> None:
    task_id, _ = _begin(rig, rng)
    rig.tasks[task_id].add("cancelled")
    rig.node.ask(op="cancel", task_id=task_id)
    _check_retry(rig, task_id)


@fault("rows: time limit, then a retry")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.dispatch(_spec() | {"timeoutSec": rng.uniform(0.05, 0.6)}, "timeout", "ok")
    _check_retry(rig, task_id)


@fault("rows: SIGKILL among merged children, each then by itself")
def _(rig: Rig, rng: random.Random) -> None:
    spec = _spec() | {"count": COUNT // 3}
    children = [{"task_id": f"{rng.randrange(1 << 60):x}-{number}", "spec": spec} for number in range(2)]
    task_id = rig.dispatch(spec, *KILLED, merged_children=children)
    pid = rig.child(task_id)
    rig.pause(rng, 0.6)
    rig.hit(pid, signal.SIGKILL)
    rig.check()
    (end, *_) = rig.peer.ends(task_id)
    told = end["payload"].get("rows", {}).get("children", {})
    for child in children:
        stood = _kept(rig, child["task_id"])
        done = len(stood.current)
        if end["type"] == "TASK_FAILED" and stood.head is not None and told[child["task_id"]]["done"] != done:
            raise Lost(f"the event says {told} of the children, and {done} rows of {child['task_id']} are on disk")
        rig.dispatch(spec, task_id=child["task_id"])
        rig.check()
        if (reused := rig.node.result(child["task_id"])["reused"]) != done:
            raise Lost(f"{done} rows of a merged child stood, and its retry took over {reused}")
