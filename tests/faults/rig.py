"""The rig for faults: a Redis, a node, a peer and an HTTP server, and the checks after each fault."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import redis

from tests.kit.clock_shim import PASS_ENV, Clock, compiler
from tests.kit.http_server import Server
from tests.kit.promises import leaves, of_tasks
from tests.kit.support import (
    Node,
    Orchestrator,
    RedisServer,
    alive,
    below,
    short_dir,
    spares,
    until,
    with_mark,
)

BEAT_S = 1.0
LATE_S = 1.0
"""How late a heartbeat may be."""
GONE_S = 5.0
"""How long after the last task's end its leftovers may still exist."""
END_S = 40.0
"""A task without a terminal event after this time is lost."""
HANG_S = 25.0
"""No task of the matrix is silent for this long."""
SOCKET_SLACK = 6
"""How many more connections to Redis the pools of events and of the queue may keep than at the first count."""

CONFIG = f"""
[redis]
heartbeat_interval_s = {BEAT_S}
timeout_s = 2

[results]
min_free_bytes = 0

[tasks]
cancel_grace_s = 0.3
term_grace_s = 0.3
log_max_bytes = 1048576
hang_timeout_s = {HANG_S}
pass_env = {json.dumps(PASS_ENV)}
allow_command = ["*"]
allow_serve = ["127.0.0.1"]

[processes]
isolation = "{{isolation}}"
adoption_timeout_s = 20

[environments.other]
python = "{{python}}"

[task_types.other]
runner = "runners.echo:EchoRunner"
environment = "other"

[task_types.misbehave]
runner = "tests.kit.runners_for_tests:MisbehavingRunner"
environment = "light"

[task_types.rows]
runner = "tests.kit.row_runners:RowsRunner"
environment = "light"
"""


SPARE_SOCKETS = 4
"""Sockets that a fork server has for its two spare children, which it may not have at the first count."""


class Lost(Exception):
    """Raised when a check fails; the message names each violation."""


class Rig:
    """Used for many injections, and replaced after a violation.

    Args:
        disk: `results` or `state`: mount a small tmpfs for that folder; needs root.
    """

    def __init__(self, isolation: str = "auto", disk: str | None = None) -> None:
        self.isolation = isolation
        self.disk = disk
        self.tasks: dict[str, set[str]] = {}
        """The verdicts that each task of this injection may end with."""
        self.expect_accepted = True
        self.may_repeat = False
        """Whether an event may be received twice, as after a crash."""
        self.may_be_late = False
        self.clock: Clock | None = None
        """The node's clock; None without a compiler."""
        self.tame = False
        """Whether to avoid tasks that execute programs with an empty environment: only cgroups find those again."""
        self._undelivered: set[str] = set()
        """Spool folders that are kept because their delivery failed and can be tried again."""
        self._fds: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Rig:
        with contextlib.ExitStack() as stack:
            self.server = RedisServer()
            stack.callback(self.server.close)
            self.peer = Orchestrator(self.server)
            self.http = stack.enter_context(Server())
            home = short_dir()
            if self.disk is not None:
                mount = home / {"results": "results", "state": "s"}[self.disk]
                mount.mkdir(mode=0o700)
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", str(mount)], check=True)
                stack.callback(self._unmount, mount)
            python = home / "python"
            python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            python.chmod(0o755)
            config = CONFIG.format(isolation=self.isolation, python=python)
            env = {"HEARTBEAT_INTERVAL_SEC": str(BEAT_S)}
            if compiler() is not None:
                self.clock = Clock(home / "clock")
                env |= self.clock.env
            self.node = Node(self.server, config=config, home=home, env=env)
            stack.callback(self.node.close)
            self.start_node()
            self.settle()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @staticmethod
    def _unmount(mount: Path) -> None:
        subprocess.run(["umount", "-l", str(mount)], check=True)
        shutil.rmtree(mount.parent, ignore_errors=True)

    def start_node(self) -> None:
        self.node.start()
        self._fds.clear()

    def settle(self) -> None:
        """Check that the next task runs, and take the baselines after it."""
        until(lambda: self.status()["redis_up"], "the node is connected to Redis", 30.0)
        self.begin()
        self.dispatch({"taskType": "echo"})
        self.check()

    def begin(self) -> None:
        """Start a new injection."""
        self.tasks = {}
        self.expect_accepted, self.may_repeat, self.may_be_late = True, False, False
        self.tame = False
        self.http.plan.clear()
        self._set_clock_right()
        self.peer.hear()
        self.peer.beats_heard_s.clear()
        self.peer.task_events.clear()
        self.peer.worker_events.clear()

    def _set_clock_right(self) -> None:
        """Set the clock right and wait for a heartbeat, so that no injection sees times of both clocks."""
        if self.clock is not None and self.clock.offset_s:
            self.clock.set(0)
            self.peer.hear()
            self.peer.worker_events.clear()
            self.peer.wait_worker_event("HEARTBEAT")

    def set_clock(self, rng: random.Random) -> None:
        """Set the clock by hours, to a time that it has not shown yet."""
        assert self.clock is not None, "the plan skips this fault without a clock"
        self.clock.set(self.clock.offset_s + rng.choice([-1, 1]) * rng.uniform(0.5, 40) * 3600)

    def listen(self, rng: random.Random, most_s: float = 0.6) -> None:
        """Pause, and receive events meanwhile as they are sent."""
        end = time.monotonic() + rng.uniform(0, most_s)
        while time.monotonic() < end:
            self.peer.hear(0.01)

    def dispatch(self, spec: dict[str, Any], *kinds: str, **fields: Any) -> str:
        task_id = self.peer.dispatch(self.node.worker_id, spec, **fields)
        self.tasks[task_id] = set(kinds or ("ok",))
        return task_id

    def do(self, what: str, *kinds: str, **fields: Any) -> str:
        return self.dispatch({"taskType": "misbehave", "do": what, **fields}, *kinds)

    def some_task(self, rng: random.Random, *kinds: str) -> str:
        """A harmless task of at most a second."""
        destination = {"type": "http", "url": f"{self.http.url}/r", "timeoutSec": 2}
        match rng.randrange(6):
            case 0 | 1:
                return self.dispatch({"taskType": "echo", "delaySec": rng.uniform(0, 0.5)}, *kinds)
            case 2 if not self.tame:
                return self.do("escape", *kinds, then="doze", seconds=rng.uniform(0, 0.3))
            case 3:
                return self.do("tmp", *kinds)
            case 4:
                spec = {"taskType": "echo", "delaySec": rng.uniform(0, 0.3), "output": {"destination": destination}}
                return self.dispatch(spec, *kinds)
            case _:
                return self.do("busy", *kinds, seconds=rng.uniform(0, 0.3))

    def some_tasks(self, rng: random.Random, *kinds: str) -> list[str]:
        return [self.some_task(rng, *kinds) for _ in range(rng.randint(1, 3))]

    @staticmethod
    def pause(rng: random.Random, most_s: float = 0.6) -> None:
        time.sleep(rng.uniform(0, most_s))

    def allow(self, *kinds: str) -> None:
        """Allow these verdicts for all tasks so far, too."""
        for allowed in self.tasks.values():
            allowed.update(kinds)

    def status(self) -> dict[str, Any]:
        return self.node.ask(op="status")

    def child(self, task_id: str, wait_s: float = 3.0) -> int | None:
        """The pid of the task's first process; None if it has ended already."""
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            for task in self.status()["tasks"]:
                if task["task_id"] == task_id and task["pid"]:
                    return int(task["pid"])
            if self.peer.ends(task_id):
                return None
            time.sleep(0.005)
        return None

    def server_pid(self, environment: str = "light") -> int | None:
        return next((each["pid"] for each in self.status()["servers"] if each["environment"] == environment), None)

    def delivery_child(self, wait_s: float = 5.0) -> int | None:
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            server = self.server_pid("delivery")
            if server is not None and (children := below(server)):
                return children[0]
            time.sleep(0.005)
        return None

    @staticmethod
    def hit(pid: int | None, number: int) -> None:
        """Send a signal, if the process still exists."""
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def swap_redis(self, rng: random.Random) -> None:
        """Kill Redis and start an empty one; the peer subscribes before the node can connect to it."""
        self.server.stop()
        with contextlib.suppress(redis.RedisError):
            self.peer.hear(0.05)  # events that were sent before the kill
        self.pause(rng)
        real = self.server.path
        self.server.path = real.with_suffix(".new")
        self.server.start()
        self.peer.reconnect(self.server)
        while self.peer._pubsub.get_message(timeout=0.01) is None:
            pass
        self.server.path.rename(real)
        self.server.path = real
        self._subscribes_by = self.peer.redis  # kept: a client that is garbage collected closes its connections
        self.peer.redis = self.server.client()

    def check(self) -> None:
        """Wait until all tasks have ended, and check everything.

        Raises:
            Lost: with all violations.
        """
        wrong = self._wait_ends()
        wrong += self._verdicts()
        wrong += self._late()
        deadline = time.monotonic() + GONE_S
        left = self._left()
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            left = self._left()
        if wrong or left:
            raise Lost("; ".join(wrong + left))

    def _journal(self) -> dict[str, str]:
        """The states of this injection's accepted tasks."""
        path = f"file:{self.node.state_dir / 'journal.sqlite'}?mode=ro"
        with contextlib.closing(sqlite3.connect(path, uri=True, timeout=5)) as db:
            rows = db.execute("SELECT task_id, state FROM tasks ORDER BY attempt").fetchall()
        return {task_id: state for task_id, state in rows if task_id in self.tasks}

    def _attempt(self, task_id: str) -> int:
        path = f"file:{self.node.state_dir / 'journal.sqlite'}?mode=ro"
        with contextlib.closing(sqlite3.connect(path, uri=True, timeout=5)) as db:
            return int(db.execute("SELECT max(attempt) FROM tasks WHERE task_id = ?", (task_id,)).fetchone()[0])

    def _wait_ends(self) -> list[str]:
        assert self.node.process is not None
        deadline = time.monotonic() + END_S
        states: dict[str, str] = {}
        while time.monotonic() < deadline:
            if self.node.process.poll() is not None:
                return [f"the node exited by itself with {self.node.process.returncode}"]
            self.peer.hear(0.01)
            states = self._journal()
            awaited = set(self.tasks) if self.expect_accepted else set(states)
            if all(states.get(each) == "done" and self.peer.ends(each) for each in awaited):
                return []
        return [
            f"{self._what(each)} has no terminal event ({states.get(each, 'not accepted')} in the journal)"
            for each in self.tasks
            if not self.peer.ends(each) and (self.expect_accepted or each in states)
        ]

    def _what(self, task_id: str) -> str:
        return f"{task_id} [{'/'.join(sorted(self.tasks[task_id]))}]"

    def _verdicts(self) -> list[str]:
        wrong = []
        self.peer.hear(0.02)
        for task_id, allowed in self.tasks.items():
            ends = self.peer.ends(task_id)
            distinct = {json.dumps(event, sort_keys=True) for event in ends}
            if len(distinct) > 1 or (len(ends) > 1 and not self.may_repeat):
                wrong.append(
                    f"{self._what(task_id)} has {len(ends)} terminal events, {len(distinct)} of them different"
                )
            for event in ends[:1]:
                kind = event["payload"].get("error_kind", "ok")
                if kind == "delivery_failed":
                    self._undelivered.add(str(self._attempt(task_id)))
                if kind not in allowed:
                    wrong.append(f"{self._what(task_id)} ended with {kind}: {event.get('error')}")
        return wrong

    def _late(self) -> list[str]:
        if self.may_be_late:
            return []
        if self.clock is not None and self.clock.offset_s:
            times = self.peer.beats_heard_s
        else:
            beats = [event["ts"] for event in self.peer.worker_events if event["type"] == "HEARTBEAT"]
            times = [datetime.datetime.fromisoformat(ts).timestamp() for ts in beats]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return [f"a heartbeat came {max(gaps) - BEAT_S:.2f} s late"] if gaps and max(gaps) > BEAT_S + LATE_S else []

    def _left(self) -> list[str]:
        """What is left of tasks that have ended."""
        wrong = []
        try:
            status = self.status()
        except OSError as error:
            return [f"the node does not answer on its socket: {error}"]
        if status["tasks"]:
            wrong.append(f"{len(status['tasks'])} tasks are not idle: {status['tasks'][0]['state']}")
        (worker,) = status["workers"]
        in_redis = self.server.client().hget(f"worker:{self.node.worker_id}", "status")
        if worker["task_id"] is not None or worker["status"] != "IDLE" or in_redis != b"IDLE":
            wrong.append(f"the slot is not idle: {worker['status']}, in Redis {in_redis!r}")
        if status["outbox"]:
            wrong.append(f"{status['outbox']} events are still in the outbox")
        servers = {each["pid"]: each["environment"] for each in status["servers"] if each["state"] == "ready"}
        own_pids = {self.node.pid, *servers}
        ahead = {pid for server in servers for pid in spares(server)}
        leftovers = [pid for pid in with_mark(str(self.node.home)) if pid not in own_pids | ahead] + of_tasks(
            status["node_id"]
        )
        wrong += [f"pid {pid} is left: {_command(pid)}" for pid in dict.fromkeys(leftovers) if alive(pid)]
        wrong += [f"the cgroup {name} is left" for name in leaves(status["node_id"])]
        for name in ("tmp", "spool"):
            there = set(os.listdir(self.node.state_dir / name))
            wrong += [f"{name}/{each} is left" for each in there - (self._undelivered if name == "spool" else set())]
        sockets = [each for each in os.listdir(self.node.state_dir / "run") if each.endswith(".sock")]
        if len(sockets) != 1 + len(status["servers"]):
            wrong.append(f"sockets in run/: {sockets}")
        return wrong + self._leaks(own_pids)

    def _leaks(self, pids: set[int]) -> list[str]:
        """Descriptors beyond the first count of each process, which was also taken while no task ran."""
        wrong = []
        for pid in pids:
            try:
                links = [str(Path(f"/proc/{pid}/fd", fd).readlink()) for fd in os.listdir(f"/proc/{pid}/fd")]
            except OSError:
                continue
            sockets = sum(link.startswith("socket:") for link in links)
            first = self._fds.setdefault(pid, (len(links) - sockets, sockets))
            slack = SOCKET_SLACK if pid == self.node.pid else SPARE_SOCKETS
            if len(links) - sockets > first[0] or sockets > first[1] + slack:
                name = "the supervisor" if pid == self.node.pid else "a fork server"
                wrong.append(f"{name} has {len(links) - sockets} files and {sockets} sockets open, at first {first}")
        return wrong


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")[:60]
    return "?"
