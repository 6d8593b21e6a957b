"""Faults of the fork server of tasks."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

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


def _without(rig: Rig, rng: random.Random, part: str) -> None:
    """Delete a folder of a task that is prepared and not forked yet."""
    kinds = ("ok", "node_fault") if part == "spool" else ("ok",)  # its outcome may have been in there already
    task_id = rig.dispatch({"taskType": "echo"}, *kinds)
    server = rig.server_pid()
    rig.hit(server, signal.SIGSTOP)
    last = rig.dispatch({"taskType": "echo"}, *kinds)
    rig.pause(rng, 0.4)
    for task in (task_id, last):
        for folder in _folders(rig, task, part):
            shutil.rmtree(folder, ignore_errors=True)
    rig.hit(server, signal.SIGCONT)


def _folders(rig: Rig, task_id: str, part: str) -> list[Path]:
    spool = rig.node.state_dir / "spool"
    attempts = []
    for job in spool.glob("*/job.json"):
        try:
            found = json.loads(job.read_text())
        except (OSError, ValueError):
            continue
        if found["task_id"] == task_id:
            attempts.append(job.parent.name)
    if not attempts:  # it has ended already
        return []
    by_part = {"results": [rig.node.results_dir / task_id], "spool": [spool / each for each in attempts]}
    return by_part.get(part) or [rig.node.state_dir / "tmp" / each for each in attempts]


@fault("child: its spool folder is deleted before the fork")
def _(rig: Rig, rng: random.Random) -> None:
    _without(rig, rng, "spool")


@fault("child: its TMPDIR is deleted before the fork")
def _(rig: Rig, rng: random.Random) -> None:
    _without(rig, rng, "tmp")


@fault("child: its results folder is deleted before the fork")
def _(rig: Rig, rng: random.Random) -> None:
    _without(rig, rng, "results")


@fault("fork server: SIGKILL by its own task")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("patricide", "node_fault")


@fault("fork server: retired while tasks run")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.pause(rng)
    rig.node.ask(op="recycle")
