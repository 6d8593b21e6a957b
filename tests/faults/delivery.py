"""Faults while a result is delivered."""

from __future__ import annotations

import contextlib
import random
import signal
from pathlib import Path

from tests.faults.rig import Rig
from tests.faults.table import crashes, fault, until
from tests.kit.http_server import Stall


def deliver(rig: Rig, *kinds: str) -> str:
    """A task that delivers to a server which stalls once."""
    rig.http.plan.append(Stall())
    destination = {"type": "http", "url": f"{rig.http.url}/r", "timeoutSec": 2}
    return rig.dispatch({"taskType": "echo", "output": {"destination": destination}}, *kinds)


@fault("delivery child: SIGKILL", weight=6)
def _(rig: Rig, rng: random.Random) -> None:
    deliver(rig)
    child = rig.delivery_child()
    rig.pause(rng, 0.3)
    rig.hit(child, signal.SIGKILL)


@fault("delivery child: SIGSTOP, SIGCONT")
def _(rig: Rig, rng: random.Random) -> None:
    deliver(rig)
    child = rig.delivery_child()
    rig.hit(child, signal.SIGSTOP)
    rig.pause(rng)
    rig.hit(child, signal.SIGCONT)


@fault("delivery child: SIGSTOP, SIGKILL")
def _(rig: Rig, rng: random.Random) -> None:
    deliver(rig)
    child = rig.delivery_child()
    rig.hit(child, signal.SIGSTOP)
    rig.pause(rng)
    rig.hit(child, signal.SIGKILL)


@fault("delivery child: cancelled")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = deliver(rig, "cancelled", "ok")
    rig.pause(rng, 0.4)
    rig.node.ask(op="cancel", task_id=task_id)


@fault("delivery's fork server: SIGKILL")
def _(rig: Rig, rng: random.Random) -> None:
    deliver(rig)
    rig.delivery_child()
    rig.pause(rng, 0.3)
    rig.hit(rig.server_pid("delivery"), signal.SIGKILL)


@fault("supervisor: SIGKILL while delivering", weight=6)
def _(rig: Rig, rng: random.Random) -> None:
    deliver(rig)
    rig.delivery_child()
    crashes(rig)
    rig.pause(rng, 0.3)
    if rng.random() < 0.5:
        rig.hit(rig.server_pid("delivery"), signal.SIGKILL)
    rig.node.kill()
    rig.start_node()


def _in_its_place(log: Path) -> bool:
    """A folder instead of the log; False if the fork server that was started again was faster."""
    log.unlink(missing_ok=True)
    with contextlib.suppress(FileExistsError):
        log.mkdir()
    return log.is_dir()


@fault("delivery: its environment is broken and mended")
def _(rig: Rig, rng: random.Random) -> None:
    deliver(rig)
    rig.hit(rig.server_pid("delivery"), signal.SIGKILL)
    log = rig.node.state_dir / "log" / "delivery.log"
    until(lambda: _in_its_place(log), "a folder is where the log was")
    for _ in range(rng.randint(1, 3)):
        deliver(rig)
    rig.pause(rng, 1.0)
    log.rmdir()
