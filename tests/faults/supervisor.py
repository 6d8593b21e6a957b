"""Faults of the supervisor, alone or together with its fork server."""

from __future__ import annotations

import random
import signal

from tests.faults.rig import Rig
from tests.faults.table import crashes, fault, orphans, until


@fault("supervisor: SIGKILL, started again", weight=10)
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    crashes(rig)
    for _ in range(rng.randint(1, 2)):
        rig.pause(rng)
        rig.node.kill()
        rig.start_node()


@fault("supervisor: SIGSTOP, SIGCONT")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.pause(rng)
    rig.may_be_late = True
    rig.hit(rig.node.pid, signal.SIGSTOP)
    rig.pause(rng, 1.5)
    rig.hit(rig.node.pid, signal.SIGCONT)


@fault("supervisor: SIGSTOP, SIGKILL, started again")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.pause(rng)
    crashes(rig)
    rig.hit(rig.node.pid, signal.SIGSTOP)
    rig.pause(rng)
    rig.node.kill()
    rig.start_node()


@fault("supervisor: hot upgrade by SIGUSR2", weight=6)
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.pause(rng)
    crashes(rig)
    before = rig.node.text().count("node started:")
    rig.hit(rig.node.pid, signal.SIGUSR2)
    until(lambda: rig.node.text().count("node started:") > before, "the new supervisor starts")
    until(
        lambda: rig.node.text().rpartition("node started:")[2].count("subscribed"), "the new supervisor is subscribed"
    )
    rig._fds.clear()


@fault("supervisor and fork server: SIGKILL together")
def _(rig: Rig, rng: random.Random) -> None:
    orphans(rig)
    rig.some_tasks(rng, "ok", "supervisor_lost")
    rig.pause(rng)
    crashes(rig)
    server = rig.server_pid()
    pids = [rig.node.pid, server]
    rng.shuffle(pids)
    for pid in pids:
        rig.hit(pid, signal.SIGKILL)
    rig.allow("node_fault")
    rig.node.kill()
    rig.start_node()
