"""Faults of a task's ranks."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

from tests.faults.rig import Rig
from tests.faults.table import KILLED, fault, until


def _group(rig: Rig, *kinds: str, seconds: float) -> tuple[str, list[int]]:
    """Start a task with two ranks; returns its id and the ranks' pids in order."""
    task_id = rig.do("ranks", *kinds, seconds=seconds)
    note = rig.node.results_dir / task_id / "ranks"
    until(lambda: note.exists() and note.read_text().count("\n") == 2, "both ranks are running")
    return task_id, [int(line.split()[1]) for line in sorted(note.read_text().splitlines())]


def _hit_rank(rank: int, *numbers: int, kinds: tuple[str, ...]) -> Callable[[Rig, random.Random], None]:
    def act(rig: Rig, rng: random.Random) -> None:
        task_id, pids = _group(rig, *kinds, seconds=rng.uniform(0.3, 1.5))
        for number in numbers:
            rig.pause(rng)
            rig.hit(pids[rank], number)
        if numbers[-1] == signal.SIGSTOP:
            rig.pause(rng, 0.3)
            rig.node.ask(op="cancel", task_id=task_id)

    return act


for _rank, _other in ((0, "rank 0"), (1, "the other rank")):
    fault(f"{_other}: SIGKILL")(_hit_rank(_rank, signal.SIGKILL, kinds=KILLED))
    fault(f"{_other}: SIGSTOP, SIGCONT")(_hit_rank(_rank, signal.SIGSTOP, signal.SIGCONT, kinds=("ok",)))
    fault(f"{_other}: SIGSTOP, then cancelled")(_hit_rank(_rank, signal.SIGSTOP, kinds=("cancelled", "ok")))


@fault("ranks: their parent is killed")
def _(rig: Rig, rng: random.Random) -> None:
    task_id, _ = _group(rig, "crash", "ok", seconds=rng.uniform(0.3, 1.5))
    rig.pause(rng)
    rig.hit(rig.child(task_id), signal.SIGKILL)
