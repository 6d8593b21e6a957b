"""Faults of the fork server of tasks."""

from __future__ import annotations

import random
import signal

from tests.faults.rig import Rig
from tests.faults.table import fault, orphans


@fault("fork server: SIGKILL", weight=8)
def _(rig: Rig, rng: random.Random) -> None:
    orphans(rig)
    rig.some_tasks(rng, "ok", "node_fault")
    rig.pause(rng)
    rig.hit(rig.server_pid(), signal.SIGKILL)


@fault("fork server: SIGSTOP, SIGCONT")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.pause(rng)
    server = rig.server_pid()
    rig.hit(server, signal.SIGSTOP)
    rig.pause(rng, 1.5)
    rig.hit(server, signal.SIGCONT)


@fault("fork server: SIGSTOP, SIGKILL")
def _(rig: Rig, rng: random.Random) -> None:
    orphans(rig)
    rig.some_tasks(rng, "ok", "node_fault")
    rig.pause(rng)
    server = rig.server_pid()
    rig.hit(server, signal.SIGSTOP)
    rig.pause(rng)
    rig.hit(server, signal.SIGKILL)


@fault("fork server: SIGKILL by its own task")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("patricide", "node_fault")


@fault("fork server: retired while tasks run")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.pause(rng)
    rig.node.ask(op="recycle")
