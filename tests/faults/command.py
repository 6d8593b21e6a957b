"""Faults of tasks that run a program."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

from tests.faults.rig import Rig
from tests.faults.table import KILLED, crashes, fault, orphans, until

LOOP = "trap '' HUP; (trap '' TERM; setsid sleep 300) & sleep {seconds:.2f}"
"""Leaves a process that has left its session and ignores SIGTERM."""


def _run(rig: Rig, text: str, *kinds: str) -> tuple[str, int]:
    """Start a script; returns the task's id and the pid of its shell."""
    spec = {"taskType": "command", "script": f"echo $$ > pid; mv pid started; {text}"}
    task_id = rig.dispatch(spec, *kinds)
    note = Path(rig.node.results_dir, task_id, "work/started")
    until(note.exists, "the program runs")
    return task_id, int(note.read_text())


@fault("command: every exit status")
def _(rig: Rig, rng: random.Random) -> None:
    code = rng.choice([0, 1, 3, 127, 255])
    rig.dispatch({"taskType": "command", "script": f"exit {code}"}, "error" if code else "ok")


@fault("command: leaves processes and ends")
def _(rig: Rig, rng: random.Random) -> None:
    orphans(rig)
    _run(rig, LOOP.format(seconds=rng.uniform(0, 0.5)), "ok")


def _hit(number: int, *kinds: str) -> Callable[[Rig, random.Random], None]:
    def act(rig: Rig, rng: random.Random) -> None:
        _, pid = _run(rig, LOOP.format(seconds=rng.uniform(0.3, 1.0)), *kinds)
        rig.pause(rng, 0.3)
        rig.hit(pid, number)

    return act


fault("command: its program is killed")(_hit(signal.SIGKILL, *KILLED))
fault("command: its program has a segmentation fault")(_hit(signal.SIGSEGV, *KILLED))


@fault("command: a rank of its torchrun group is killed", weight=1)
def _(rig: Rig, rng: random.Random) -> None:
    text = "echo $$ > $RANK.pid; mv $RANK.pid $RANK.started; sleep 300"
    spec = {"taskType": "command", "command": ["sh", "-c", text], "nproc_per_node": 2}
    task_id = rig.dispatch(spec, "error")
    notes = [Path(rig.node.results_dir, task_id, f"work/{rank}.started") for rank in (0, 1)]
    until(lambda: all(note.exists() for note in notes), "both ranks run", 30.0)
    rig.hit(int(rng.choice(notes).read_text()), signal.SIGKILL)


@fault("command: its runner is killed")
def _(rig: Rig, rng: random.Random) -> None:
    task_id, _ = _run(rig, LOOP.format(seconds=1.0), *KILLED)
    pid = rig.child(task_id)
    rig.pause(rng, 0.3)
    rig.hit(pid, signal.SIGKILL)


@fault("command: cancelled, and ignores SIGTERM")
def _(rig: Rig, rng: random.Random) -> None:
    task_id, _ = _run(rig, "trap '' TERM; while :; do sleep 0.05; done", "cancelled")
    rig.pause(rng, 0.3)
    rig.node.ask(op="cancel", task_id=task_id, force=rng.random() < 0.3)


@fault("command: the supervisor is killed while it runs")
def _(rig: Rig, rng: random.Random) -> None:
    crashes(rig)
    _run(rig, LOOP.format(seconds=rng.uniform(0.2, 2.0)), "ok")
    rig.pause(rng, 0.3)
    rig.node.kill()
    rig.start_node()
