"""Disks without room."""

from __future__ import annotations

import random
from pathlib import Path

from tests.faults.rig import Rig
from tests.faults.table import fault


@fault("disk: the results' disk is full", disk="results")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.do("fill", "error", "delivery_failed", "node_fault", "crash", where="results")
    rig.peer.wait_end(task_id)
    (rig.node.results_dir / task_id / "filler").unlink(missing_ok=True)


@fault("disk: the results' disk is full before a task comes", disk="results")
def _(rig: Rig, rng: random.Random) -> None:
    filler = rig.node.results_dir / "filler"
    _fill(filler)
    rig.dispatch({"taskType": "echo"}, "delivery_failed", "crash", "ok")
    rig.pause(rng, 1.0)
    filler.unlink()


@fault("disk: a task fills its TMPDIR, on the state's disk", disk="state")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("fill", "error", "crash", "node_fault", where="tmp")
    rig.some_tasks(rng, "ok", "node_fault")


@fault("disk: the state's disk is full before tasks come", disk="state")
def _(rig: Rig, rng: random.Random) -> None:
    filler = rig.node.state_dir / "cache" / "filler"
    _fill(filler)
    rig.expect_accepted = False
    for _ in range(3):
        rig.dispatch({"taskType": "echo"}, "ok", "node_fault", "crash", "delivery_failed")
    rig.pause(rng, 1.0)
    filler.unlink()


def _fill(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError:
            try:
                while True:
                    file.write(b"\0")
            except OSError:
                return
