"""Faults of who is told by webhooks, and of what sends to it: no task waits for it, and each message arrives."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Iterator

from tests.faults.rig import Lost, Rig
from tests.faults.table import crashes, fault, until
from tests.kit.http_server import Answer, Reset, Server, Stall, Step


@contextlib.contextmanager
def told(rig: Rig, *plan: Step) -> Iterator[Server]:
    """A receiver with this plan, and the node started again with its address; afterwards without it."""
    config = rig.node.home / "node.toml"
    before = config.read_text()
    crashes(rig)
    with Server(*plan) as hooks:
        rig.node.kill()
        config.write_text(f'{before}\n[notify]\nurl = "{hooks.url}"\ntimeout_s = 1.0\nevents = ["failed"]\n')
        rig.start_node()
        try:
            yield hooks
        finally:
            config.write_text(before)
            rig.node.kill()
            rig.start_node()


def arrives(rig: Rig, hooks: Server, task_id: str) -> None:
    """Check that the task ends first, and that it is told then, under one id."""
    rig.peer.wait_end(task_id)
    hooks.release()

    def ids() -> set[str]:
        with hooks.lock:
            found = [each for each in hooks.received if each.json["data"].get("task_id") == task_id]
        return {each.headers["webhook-id"] for each in found}

    until(ids, f"{task_id} is told", 30.0)
    if len(ids()) > 1:
        raise Lost(f"{task_id} was told under {len(ids())} ids")


@fault("webhook receiver: hangs")
def _(rig: Rig, rng: random.Random) -> None:
    with told(rig, *[Stall()] * rng.randint(1, 3)) as hooks:
        task_id = rig.do("raise", "error")
        rig.some_tasks(rng)
        rig.pause(rng)
        arrives(rig, hooks, task_id)


@fault("webhook receiver: breaks off and answers errors")
def _(rig: Rig, rng: random.Random) -> None:
    steps = [rng.choice([Reset(), Answer(500), Answer(503, early=True)]) for _ in range(rng.randint(1, 3))]
    with told(rig, *steps) as hooks:
        arrives(rig, hooks, rig.do("raise", "error"))


@fault("webhook sender: SIGKILL")
def _(rig: Rig, rng: random.Random) -> None:
    with told(rig, Stall()) as hooks:
        task_id = rig.do("raise", "error")
        child = rig.delivery_child()
        rig.pause(rng, 0.3)
        rig.hit(child, signal.SIGKILL)
        arrives(rig, hooks, task_id)


@fault("supervisor: SIGKILL while a webhook waits")
def _(rig: Rig, rng: random.Random) -> None:
    with told(rig, *[Stall()] * 2) as hooks:
        task_id = rig.do("raise", "error")
        rig.peer.wait_end(task_id)
        rig.pause(rng)
        rig.node.kill()
        rig.start_node()
        arrives(rig, hooks, task_id)
