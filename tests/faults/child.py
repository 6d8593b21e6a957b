"""Faults of a task's first process, and what it leaves behind."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

from tests.faults.rig import Rig
from tests.faults.table import KILLED, fault, until


def _hit_child(number: int, *kinds: str) -> Callable[[Rig, random.Random], None]:
    def act(rig: Rig, rng: random.Random) -> None:
        what = rng.choice(["sleep", "deaf", "escape", "busy"])
        task_id = rig.do(what, *kinds, seconds=rng.uniform(0.3, 1.0), then="doze")
        if what == "deaf":
            rig.tasks[task_id].add("cancelled")
        pid = rig.child(task_id)
        rig.pause(rng, 0.3)
        rig.hit(pid, number)
        if what == "deaf":
            rig.pause(rng, 0.3)
            rig.node.ask(op="cancel", task_id=task_id)

    return act


fault("child: SIGKILL", weight=8)(_hit_child(signal.SIGKILL, *KILLED))
fault("child: SIGSEGV")(_hit_child(signal.SIGSEGV, *KILLED))
fault("child: SIGABRT")(_hit_child(signal.SIGABRT, *KILLED))
fault("child: SIGTERM from a stranger")(_hit_child(signal.SIGTERM, *KILLED))


@fault("child: SIGSTOP, SIGCONT")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.do("sleep", seconds=rng.uniform(0.1, 0.6))
    pid = rig.child(task_id)
    rig.hit(pid, signal.SIGSTOP)
    rig.pause(rng)
    rig.hit(pid, signal.SIGCONT)


@fault("child: SIGSTOP, then cancelled")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.do("sleep", "cancelled", "ok", seconds=60)
    pid = rig.child(task_id)
    rig.pause(rng, 0.2)
    rig.hit(pid, signal.SIGSTOP)
    rig.node.ask(op="cancel", task_id=task_id)


@fault("child: segmentation fault")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("segfault", "crash")


@fault("child: abort")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("abort", "crash")


@fault("child: exits without a word")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("exit", "crash", code=rng.choice([0, 1, 77]))


@fault("child: SIGKILL of itself among other tasks")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.do("kill_self", "crash")
    rig.some_tasks(rng)


@fault("child: ignores SIGTERM, cancelled", weight=6)
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.do("deaf", "cancelled")
    rig.pause(rng)
    rig.node.ask(op="cancel", task_id=task_id, force=rng.random() < 0.3)


@fault("child: ignores SIGTERM, times out")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("deaf", "timeout", timeoutSec=rng.uniform(0.1, 0.5))


@fault("child: escapes by double fork and setsid", weight=8)
def _(rig: Rig, rng: random.Random) -> None:
    then = rng.choice(["return", "die", "doze"])
    rig.do("escape", "crash" if then == "die" else "ok", then=then, seconds=0.2)


@fault("child: escapes, then cancelled")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.do("escape", "cancelled", then="sleep")
    rig.pause(rng)
    rig.node.ask(op="cancel", task_id=task_id)


@fault("child: hops from pid to pid")
def _(rig: Rig, rng: random.Random) -> None:
    then = rng.choice(["return", "die"])
    rig.do("hop", "crash" if then == "die" else "ok", then=then)


@fault("child: fork bomb of 100 to 300")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("fork_bomb", "crash", count=rng.randint(50, 150))


@fault("child: exhausts its descriptors")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("open_files", "error", "crash")


@fault("child: leaves files in TMPDIR")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("tmp")


def _leave(what: str) -> Callable[[Rig, random.Random], None]:
    def act(rig: Rig, rng: random.Random) -> None:
        then = rng.choice(["return", "die"])
        verdict = "crash" if then == "die" else "ok"
        rig.do("leave", verdict, leaves=what, then=then)
        rig.some_tasks(rng)

    return act


fault("child: leaves a folder 1,500 levels deep")(_leave("deep"))
fault("child: leaves folders without rights")(_leave("closed"))
fault("child: leaves links, a pipe and a socket")(_leave("links"))
fault("child: leaves odd names")(_leave("names"))
fault("child: swaps its folders for links")(_leave("swapped"))


@fault("child: leaves shared memory, killed")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.do("shm", "crash", then="die")
    note = rig.node.results_dir / task_id / "shm"
    until(lambda: note.exists() and note.read_text(), "the task has written the block's name")
    block = Path("/dev/shm", note.read_text())
    until(lambda: not block.exists(), f"{block} is removed")
