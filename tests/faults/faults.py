"""The faults: each is injected at a random moment of a task's life, and declares the verdicts that may follow."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.rig import Lost, Rig
from tests.http_server import Stall

SLOW_S = 12.0
"""What a busy machine, a restart and the escalation's steps may add to a time limit. Clocks are set by more."""
KILLED = ("crash", "ok")
"""Verdicts of a task whose child was killed from outside; "ok" if it had ended before."""


@dataclass(frozen=True)
class Fault:
    name: str
    act: Callable[[Rig, random.Random], None]
    disk: str | None = None
    weight: int = 4
    """How often it is drawn, relative to the others."""
    sets_clock: bool = False


FAULTS: list[Fault] = []


def fault(
    name: str, *, disk: str | None = None, weight: int = 4, sets_clock: bool = False
) -> Callable[[Callable[[Rig, random.Random], None]], None]:
    def add(act: Callable[[Rig, random.Random], None]) -> None:
        FAULTS.append(Fault(name, act, disk, weight, sets_clock))

    return add


def crashes(rig: Rig) -> None:
    """From here on a dispatch may be lost, an event may be sent twice, and a heartbeat may be late."""
    rig.expect_accepted, rig.may_repeat, rig.may_be_late = False, True, True


def orphans(rig: Rig) -> None:
    """Processes that a task left may be reparented to init.

    Without a cgroup, nothing then shows where a program belongs that was executed with an empty environment.
    """
    rig.tame = rig.status()["isolation"] == "subreaper"


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
    _until(lambda: rig.node.text().count("node started:") > before, "the new supervisor starts")
    _until(
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


@fault("child: leaves shared memory, killed")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.do("shm", "crash", then="die")
    note = rig.node.results_dir / task_id / "shm"
    _until(lambda: note.exists() and note.read_text(), "the task has written the block's name")
    block = Path("/dev/shm", note.read_text())
    _until(lambda: not block.exists(), f"{block} is removed")


@fault("pipe: garbage")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("garbage")


@fault("pipe: truncated frames")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("truncated")


@fault("pipe: a frame of 100 MB")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("huge_frame")


@fault("pipe: frames as fast as they go")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("flood_pipe", seconds=rng.uniform(0.2, 1.5))


@fault("pipe: closed by the child")
def _(rig: Rig, rng: random.Random) -> None:
    rig.do("close_pipe")


@fault("pipe: child stops reading, node keeps talking")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.do("deaf", "cancelled")
    rig.child(task_id)
    for _ in range(20):
        rig.node.ask(op="cancel", task_id=task_id)


@fault("logs: a flood of 20 MB")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.do("log_flood", megabytes=20)
    rig.peer.wait_end(task_id)
    log = rig.node.results_dir / task_id / "logs" / "stdout.log"
    if log.exists() and log.stat().st_size > 2 * 1024 * 1024:
        raise Lost(f"the task's log has {log.stat().st_size} bytes; the limit is 1 MiB")


def _deliver(rig: Rig, *kinds: str) -> str:
    """A task that delivers to a server which stalls once."""
    rig.http.plan.append(Stall())
    destination = {"type": "http", "url": f"{rig.http.url}/r", "timeoutSec": 2}
    return rig.dispatch({"taskType": "echo", "output": {"destination": destination}}, *kinds)


@fault("delivery child: SIGKILL", weight=6)
def _(rig: Rig, rng: random.Random) -> None:
    _deliver(rig)
    child = rig.delivery_child()
    rig.pause(rng, 0.3)
    rig.hit(child, signal.SIGKILL)


@fault("delivery child: SIGSTOP, SIGCONT")
def _(rig: Rig, rng: random.Random) -> None:
    _deliver(rig)
    child = rig.delivery_child()
    rig.hit(child, signal.SIGSTOP)
    rig.pause(rng)
    rig.hit(child, signal.SIGCONT)


@fault("delivery child: SIGSTOP, SIGKILL")
def _(rig: Rig, rng: random.Random) -> None:
    _deliver(rig)
    child = rig.delivery_child()
    rig.hit(child, signal.SIGSTOP)
    rig.pause(rng)
    rig.hit(child, signal.SIGKILL)


@fault("delivery child: cancelled")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = _deliver(rig, "cancelled", "ok")
    rig.pause(rng, 0.4)
    rig.node.ask(op="cancel", task_id=task_id)


@fault("delivery's fork server: SIGKILL")
def _(rig: Rig, rng: random.Random) -> None:
    _deliver(rig)
    rig.delivery_child()
    rig.pause(rng, 0.3)
    rig.hit(rig.server_pid("delivery"), signal.SIGKILL)


@fault("supervisor: SIGKILL while delivering", weight=6)
def _(rig: Rig, rng: random.Random) -> None:
    _deliver(rig)
    rig.delivery_child()
    crashes(rig)
    rig.pause(rng, 0.3)
    if rng.random() < 0.5:
        rig.hit(rig.server_pid("delivery"), signal.SIGKILL)
    rig.node.kill()
    rig.start_node()


def _group(rig: Rig, *kinds: str, seconds: float) -> tuple[str, list[int]]:
    """Start a task with two ranks; returns its id and the ranks' pids in order."""
    task_id = rig.do("ranks", *kinds, seconds=seconds)
    note = rig.node.results_dir / task_id / "ranks"
    _until(lambda: note.exists() and note.read_text().count("\n") == 2, "both ranks are running")
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


@fault("clock: set by hours while tasks run", weight=8, sets_clock=True)
def _(rig: Rig, rng: random.Random) -> None:
    """Time limits, heartbeats and reported runtimes do not change."""
    _timed(rig, rng, lambda: _set_again_and_again(rig, rng))


@fault("clock: set by hours while no supervisor lives", weight=8, sets_clock=True)
def _(rig: Rig, rng: random.Random) -> None:
    crashes(rig)

    def restart() -> None:
        rig.node.kill()
        rig.set_clock(rng)
        rig.start_node()
        rig.listen(rng)

    _timed(rig, rng, restart)


@fault("clock: set by hours between deliveries", sets_clock=True)
def _(rig: Rig, rng: random.Random) -> None:
    _deliver(rig)
    rig.delivery_child()
    _set_again_and_again(rig, rng)


def _set_again_and_again(rig: Rig, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 5)):
        rig.listen(rng)
        rig.set_clock(rng)


def _timed(rig: Rig, rng: random.Random, act: Callable[[], None]) -> None:
    """Call `act` while a task runs. Its time limit and its runtime must be right all the same."""
    limit_s = rng.uniform(1.5, 4.0)
    began = time.monotonic()
    if rng.random() < 0.5:
        task_id = rig.do("deaf", "timeout", timeoutSec=limit_s)
    else:
        task_id = rig.dispatch({"taskType": "echo", "delaySec": rng.uniform(0.3, 2.0), "timeoutSec": 30})
    _until(lambda: rig.child(task_id), "the task is running")
    rig.listen(rng)
    act()
    end = rig.peer.wait_end(task_id)
    took_s, reported_s = time.monotonic() - began, end["payload"]["runtime_sec"]
    if not 0.0 < reported_s <= took_s:
        raise Lost(f"{task_id} reports a runtime of {reported_s} s, but ended {took_s:.2f} s after its dispatch")
    if rig.tasks[task_id] == {"timeout"} and not limit_s <= reported_s <= limit_s + SLOW_S:
        raise Lost(f"{task_id} timed out after {reported_s:.2f} s; its limit is {limit_s:.2f} s")


@fault("disk: the results' disk is full", disk="results")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = rig.do("fill", "error", "delivery_failed", "node_fault", "crash", where="results")
    rig.peer.wait_end(task_id)
    (rig.node.results_dir / task_id / "filler").unlink(missing_ok=True)


@fault("disk: the results' disk is full before a task comes", disk="results")
def _(rig: Rig, rng: random.Random) -> None:
    filler = rig.node.results_dir / "filler"
    _fill(filler)
    task_id = rig.dispatch({"taskType": "echo"}, "node_fault", "delivery_failed", "crash", "ok")
    rig.peer.wait_end(task_id)
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


def away(rig: Rig) -> None:
    rig.expect_accepted, rig.may_repeat, rig.may_be_late = False, True, True


@fault("Redis: SIGKILL, started again empty", weight=6)
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    away(rig)
    rig.pause(rng)
    rig.swap_redis(rng)


@fault("Redis: SIGSTOP, SIGCONT", weight=6)
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    away(rig)
    rig.pause(rng)
    assert rig.server.process is not None
    rig.hit(rig.server.process.pid, signal.SIGSTOP)
    rig.pause(rng, 3.0)
    rig.hit(rig.server.process.pid, signal.SIGCONT)


@fault("Redis: FLUSHDB")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.pause(rng)
    rig.peer.redis.flushdb()
    key = f"worker:{rig.node.worker_id}"
    _until(lambda: rig.peer.redis.exists(key), "the node registers again")


@fault("Redis: slow (CLIENT PAUSE)")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_tasks(rng)
    rig.may_be_late = True
    rig.pause(rng)
    rig.peer.redis.execute_command("CLIENT", "PAUSE", rng.randint(100, 1500))


@fault("Redis: cuts every connection")
def _(rig: Rig, rng: random.Random) -> None:
    ids = rig.some_tasks(rng)
    for task_id in ids:
        _until(lambda task_id=task_id: rig.peer.of_task(task_id), "the task has started")
    away(rig)
    rig.peer.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


@fault("dispatch: each message twice")
def _(rig: Rig, rng: random.Random) -> None:
    for _ in range(3):
        when = f"2026-01-01T00:00:{rng.randint(10, 59)}+00:00"
        spec = {"taskType": "echo", "delaySec": rng.uniform(0, 0.1)}
        task_id = rig.dispatch(spec, dispatched_at=when)
        rig.pause(rng, 0.2)
        rig.dispatch(spec, task_id=task_id, dispatched_at=when)


@fault("dispatch: cancel before its task, both twice")
def _(rig: Rig, rng: random.Random) -> None:
    task_id = f"early-{rng.getrandbits(48):x}"
    when = "2026-01-01T00:00:00+00:00"
    word = json.dumps({"type": "CANCEL", "task_id": task_id})
    for _ in range(2):
        rig.peer.redis.publish("flowmesh.control", word)
    for _ in range(2):
        rig.dispatch({"taskType": "echo"}, "cancelled", task_id=task_id, dispatched_at=when)


@fault("dispatch: garbage and messages for others")
def _(rig: Rig, rng: random.Random) -> None:
    rig.some_task(rng)
    for _ in range(20):
        junk = rng.randbytes(rng.randint(0, 3000))
        rig.peer.redis.publish(
            "tasks",
            rng.choice(
                [
                    junk,
                    b'{"assigned_worker": "w1", "task_id": "' + junk[:20].hex().encode(),
                    b'{"assigned_worker":"w2"}',
                ]
            ),
        )
        rig.peer.redis.publish("flowmesh.control", junk)
    rig.some_task(rng)


@fault("dispatch: thirty at once, a third cancelled", weight=3)
def _(rig: Rig, rng: random.Random) -> None:
    ids = [rig.dispatch({"taskType": "echo", "delaySec": 0.01}) for _ in range(30)]
    for task_id in rng.sample(ids, 10):
        rig.tasks[task_id].add("cancelled")
        rig.node.ask(op="cancel", task_id=task_id, force=rng.random() < 0.5)


def _until(condition: Callable[[], object], what: str, deadline_s: float = 15.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise Lost(f"not within {deadline_s:.0f} s: {what}")
        time.sleep(0.01)
