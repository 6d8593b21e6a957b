"""Lasting faults of the node itself: what is deleted, replaced or locked under it, and put back."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from pathlib import Path

from flowmesh.errors import EXIT_TRY_AGAIN
from flowmesh.files.removal import remove_path
from tests.faults.rig import CONFIG, Lost, Rig
from tests.faults.table import fault, until
from tests.kit.support import Node, with_mark


@fault("node: results folder replaced by a file, put back")
def _(rig: Rig, rng: random.Random) -> None:
    results, aside = rig.node.results_dir, rig.node.home / "aside"
    # A task that runs writes into the folder that it has open, or fails at a path that is a file now.
    rig.some_tasks(rng, "ok", "error", "crash", "delivery_failed")
    rig.pause(rng, 0.3)
    results.rename(aside)
    results.touch()
    rig.some_tasks(rng)
    rig.pause(rng, 1.0)
    results.unlink()
    aside.rename(results)


@fault("node: results folder deleted while no task runs")
def _(rig: Rig, rng: random.Random) -> None:
    assert not remove_path(rig.node.results_dir)
    rig.some_tasks(rng)


@fault("node: spool, tmp or log deleted while no task runs")
def _(rig: Rig, rng: random.Random) -> None:
    for name in rng.sample(["spool", "tmp", "log"], rng.randint(1, 3)):
        assert not remove_path(rig.node.state_dir / name)
    rig._undelivered.clear()
    rig.some_tasks(rng)


@fault("node: sockets and lock deleted, as by a cleaner of temporary folders")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.pause(rng)
    run = rig.node.state_dir / "run"
    gone = [*run.glob("*.sock"), rig.node.state_dir / "lock"]
    for path in gone:
        path.unlink(missing_ok=True)
    control = run / "control.sock"
    until(control.exists, "the control socket is made again")
    until(lambda: _answers(rig), "it answers")


def _answers(rig: Rig) -> bool:
    with contextlib.suppress(OSError):
        return bool(rig.status())
    return False


@fault("node: sockets deleted, supervisor SIGKILL, started again")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.pause(rng)
    rig.expect_accepted, rig.may_repeat, rig.may_be_late = False, True, True
    run = rig.node.state_dir / "run"
    servers = [path for path in run.glob("*.sock") if path.name != "control.sock"]
    pids = {server["pid"] for server in rig.status()["servers"] if server["state"] == "ready"}
    for path in servers:
        path.unlink(missing_ok=True)
    until(lambda: all(path.exists() for path in servers) or not pids <= set(_pids(rig)), "the sockets are made again")
    rig.node.kill()
    rig.start_node()


def _pids(rig: Rig) -> list[int]:
    return [server["pid"] for server in rig.status()["servers"]]


@fault("node: journal locked by another program", weight=6)
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.pause(rng, 0.3)
    rig.expect_accepted = False  # what comes meanwhile is not taken; the orchestrator queues it again
    with contextlib.closing(sqlite3.connect(_journal(rig), isolation_level=None, timeout=5)) as db:
        db.execute("BEGIN IMMEDIATE")
        rig.some_tasks(rng)
        rig.pause(rng, 1.5)
        db.execute("ROLLBACK")


@fault("node: journal deleted")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.pause(rng)
    rig.expect_accepted = False
    for path in rig.node.state_dir.glob("journal.sqlite*"):
        path.unlink(missing_ok=True)
    until(_journal(rig).exists, "the journal is made again")
    until(lambda: not rig.status()["faults"], "the fault is over")


def _journal(rig: Rig) -> Path:
    return rig.node.state_dir / "journal.sqlite"


@fault("node: environment broken and mended")
def _(rig: Rig, rng: random.Random) -> None:
    python = rig.node.home / "python"
    rig.dispatch({"taskType": "other"})
    rig.some_tasks(rng)
    rig.pause(rng)
    aside = python.with_name("aside")
    python.rename(aside)
    rig.node.ask(op="recycle", environment="other")
    rig.dispatch({"taskType": "other"})
    rig.some_tasks(rng)
    rig.pause(rng, 1.0)
    aside.rename(python)


@fault("node: a second one starts with the same worker id", weight=2)
def _(rig: Rig, rng: random.Random) -> None:
    key = f"worker:{rig.node.worker_id}"
    before = rig.peer.redis.hmget(key, "pid", "flowmesh_owner")
    rig.peer.hear()
    rig.peer.worker_events.clear()
    said = len(rig.node.text())
    rig.some_tasks(rng)
    rig.pause(rng)
    config = CONFIG.format(isolation=rig.isolation, python=rig.node.home / "python")
    with contextlib.closing(Node(rig.server, worker_id=rig.node.worker_id, config=config)) as second:
        second.start(wait=False)
        assert second.process is not None
        # Tasks come all the while: the second node must not take them, too.
        while second.process.poll() is None and len(rig.tasks) < 60:
            rig.some_task(rng)
            rig.listen(rng, 0.8)
        try:
            status = second.process.wait(15)
        except subprocess.TimeoutExpired:
            raise Lost("the second node still runs") from None
        if status != EXIT_TRY_AGAIN or "a live node" not in second.text():
            raise Lost(f"the second node ended with {status}: {second.text()[-200:]}")
        if left := with_mark(str(second.home)):
            raise Lost(f"the second node left {left}")
    rig.peer.hear()
    # The first node may owe an announcement to an earlier fault, which waited for its back-off; its log says so, just
    # after the event.
    time.sleep(0.2)
    own = Counter(re.findall(r" ((?:un)?registered) worker=", rig.node.text()[said:]))
    seen = Counter(f"{event['type'].lower()}ed" for event in rig.peer.worker_events)
    if any(seen[word] > own[word] for word in ("registered", "unregistered")):
        raise Lost(f"the second node announced the worker: {seen}, the first one {own}")
    if rig.peer.redis.hmget(key, "pid", "flowmesh_owner") != before:
        raise Lost("the second node changed the registration")


@fault("disk: the results' disk is read-only before tasks come", disk="results")
def _(rig: Rig, rng: random.Random) -> None:
    mount = str(rig.node.results_dir)
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    rig.some_tasks(rng)
    rig.pause(rng, 1.0)
    subprocess.run(["mount", "-o", "remount,rw", mount], check=True)


@fault("disk: the results' disk has no inodes before tasks come", disk="results")
def _(rig: Rig, rng: random.Random) -> None:
    mount = str(rig.node.results_dir)
    subprocess.run(["mount", "-o", "remount,nr_inodes=2000", mount], check=True)
    fillers = rig.node.results_dir / "fillers"
    fillers.mkdir()
    with contextlib.suppress(OSError):
        for number in range(2000):
            (fillers / str(number)).touch()
        raise Lost("the disk still has inodes")
    rig.some_tasks(rng)
    rig.pause(rng, 1.0)
    shutil.rmtree(fillers)
    # Not to 0, no limit: the kernel would not set one again.
    subprocess.run(["mount", "-o", "remount,nr_inodes=100000", mount], check=True)


@fault("disk: the results' disk is unmounted and mounted again", disk="results")
def _(rig: Rig, rng: random.Random) -> None:
    mount, aside = rig.node.results_dir, rig.node.home / "aside"
    aside.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", str(mount), str(aside)], check=True)
    subprocess.run(["umount", "-l", str(mount)], check=True)
    rig.some_tasks(rng)
    rig.pause(rng, 1.0)
    below = [path.name for path in mount.iterdir()]
    subprocess.run(["mount", "--bind", str(aside), str(mount)], check=True)
    subprocess.run(["umount", "-l", str(aside)], check=True)
    if below:
        raise Lost(f"results lie where the disk was not mounted: {below}")
