"""What the tests start for real: a redis-server, a node, and a peer that speaks the contract to it.

The orchestrator here is written from the contract alone, with plain redis-py and plain JSON: it shares no code with
the node.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from flowmesh.files.removal import remove_path
from tests.kit import node_zygote, reaper
from tests.kit.network import Host
from tests.kit.paths import PERMITS, ROOT

DEADLINE_S = 60.0


def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Wait for a condition, and return what it gave."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {deadline_s} s: {what}")


def short_dir() -> Path:
    """A folder with a short path: the sockets below it have bounded names. What runs in it ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="fm-"))
    reaper.watch(folder)
    return folder


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_process(process: node_zygote.Process, number: int = signal.SIGTERM, wait_s: float = 20.0) -> int:
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode


def below(pid: int) -> list[int]:
    """All processes below one, by /proc alone; not those that a fork server has ahead, which do nothing yet."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                head, _, tail = Path("/proc", name, "stat").read_text().rpartition(")")
                parent = int(tail.split()[1])
                if parent == pid and head.endswith(("(flowmesh-spare", "(flowmesh-forksrv")):
                    continue
                parents.setdefault(parent, []).append(int(name))
    found, open_ = [], [pid]
    while open_:
        children = parents.get(open_.pop(), [])
        found += children
        open_ += children
    return found


def alive(pid: int) -> bool:
    """Whether a process is there and not only waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def spares(server: int) -> list[int]:
    """The children that a fork server has ahead of its tasks."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        return [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "flowmesh-spare\n"]
    return []


def with_mark(*marks: str) -> list[int]:
    """Processes whose arguments, environment, folder or open files name one of `marks`."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        texts = []
        for file in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                texts.append(Path("/proc", name, file).read_bytes().decode("utf-8", "replace"))
        for link in ("cwd", "fd/1", "fd/2"):
            with contextlib.suppress(OSError):
                texts.append(str(Path("/proc", name, link).readlink()))
        if any(mark in text for text in texts for mark in marks) and alive(int(name)):
            found.append(int(name))
    return found


class RedisServer:
    """A real redis-server on a unix socket. Can be stopped and started again, or paused, in mid-test.

    Args:
        keep: with an append-only file, so that it has its data again after a restart.
        host: where it runs and listens for nodes on other hosts; this process reaches it by the socket.
    """

    def __init__(self, *, keep: bool = False, host: Host | None = None) -> None:
        self.keep = keep
        self._host = host
        self.binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if self.binary is None:
            if os.environ.get("CI"):
                pytest.fail("no redis-server: .ci/run must install it")
            pytest.skip("no redis-server on this machine: apt-get install redis-server")
        self.folder = short_dir()
        self.path = self.folder / "redis.sock"
        self.near_url = self.url = f"unix://{self.path}"
        """For this process, and for nodes."""
        if host is not None:
            self.url = f"redis://{host.address}:6379"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        assert self.binary is not None
        command = [self.binary, "--unixsocket", str(self.path), "--save", ""]
        if self._host is None:
            command += ["--port", "0"]
        else:
            command = [*self._host.enter, *command, "--bind", self._host.address, "--protected-mode", "no"]
        command += ["--appendonly", "yes" if self.keep else "no"]
        with open(self.folder / "redis.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        until(self._answers, "redis-server answers")

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(self.client().ping())
        return False

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.path))

    def stop(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        end_process(self.process, number)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class Orchestrator:
    """Dispatches tasks and hears events, as docs/contract.md has it."""

    def __init__(self, server: RedisServer, *, topic: str = "tasks") -> None:
        self.redis = server.client()
        self.topic = topic
        self.worker_events: list[dict[str, Any]] = []
        self.task_events: list[dict[str, Any]] = []
        self.told: list[str] = []
        """The types of all events, of both channels, in the order in which they came."""
        self.beats_heard_s: list[float] = []
        """When each heartbeat came, by a clock that nobody sets; as exactly as `hear` is called."""
        self._pubsub = self.redis.pubsub()
        self._pubsub.subscribe("workers.events", "tasks.events")
        until(lambda: self._pubsub.get_message(timeout=0.01), "subscribed")

    def reconnect(self, server: RedisServer) -> None:
        with contextlib.suppress(redis.RedisError):
            self._pubsub.close()
        self.redis = server.client()
        self._pubsub = self.redis.pubsub()
        self._pubsub.subscribe("workers.events", "tasks.events")

    def dispatch(self, worker: str, spec: dict[str, Any], task_id: str | None = None, **extra: Any) -> str:
        task_id = task_id or f"task-{uuid.uuid4().hex[:12]}"
        message = {
            "task_id": task_id,
            "task": {"apiVersion": "flowmesh/v1", "kind": "Task", "metadata": {"name": "test"}, "spec": spec},
            "task_type": spec.get("taskType"),
            "assigned_worker": worker,
            "dispatched_at": datetime.datetime.now(datetime.UTC).isoformat(),
            "parent_task_id": None,
            **extra,
        }
        self.redis.publish(self.topic, json.dumps(message))
        return task_id

    def is_heard(self) -> bool:
        """Whether a node receives what is dispatched; a worker says IDLE after that, but registers before it."""
        return any(count for _, count in self.redis.pubsub_numsub(self.topic))

    def hear(self, timeout_s: float = 0.0) -> None:
        """Take in what has been said."""
        while (message := self._pubsub.get_message(timeout=timeout_s)) is not None:
            timeout_s = 0.0
            if message["type"] == "message":
                event = json.loads(message["data"])
                self.told.append(event["type"])
                if event["type"] == "HEARTBEAT":
                    self.beats_heard_s.append(time.monotonic())
                (self.worker_events if message["channel"] == b"workers.events" else self.task_events).append(event)

    def of_task(self, task_id: str) -> list[dict[str, Any]]:
        self.hear()
        return [event for event in self.task_events if event["task_id"] == task_id]

    def ends(self, task_id: str) -> list[dict[str, Any]]:
        return [event for event in self.of_task(task_id) if event["type"] in ("TASK_SUCCEEDED", "TASK_FAILED")]

    def wait_end(self, task_id: str, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            self.hear(0.05)
            if ends := self.ends(task_id):
                return ends[0]
        raise AssertionError(f"no end of {task_id} within {deadline_s} s; heard {self.task_events[-5:]}")

    def wait_started(self, task_id: str, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        def started() -> dict[str, Any] | None:
            self.hear(0.02)
            return next((e for e in self.of_task(task_id) if e["type"] == "TASK_STARTED"), None)

        return dict(until(started, f"{task_id} starts", deadline_s))

    def wait_worker_event(self, kind: str, deadline_s: float = DEADLINE_S, **fields: Any) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            self.hear(0.02)
            for event in self.worker_events:
                if event["type"] == kind and all(event.get(name) == value for name, value in fields.items()):
                    return event
            return None

        return dict(until(found, f"{kind} {fields}", deadline_s))

    def run(self, worker: str, spec: dict[str, Any], deadline_s: float = DEADLINE_S, **extra: Any) -> dict[str, Any]:
        """Dispatch and wait for the end."""
        return self.wait_end(self.dispatch(worker, spec, **extra), deadline_s)

    def close(self) -> None:
        self._pubsub.close()
        self.redis.close()


class Node:
    """A real node in a process of its own."""

    def __init__(
        self,
        server: RedisServer,
        *args: str,
        worker_id: str = "w1",
        env: dict[str, str] | None = None,
        config: str = "",
        home: Path | None = None,
        code: Path = ROOT,
        cwd: Path | None = None,
        executed: bool = False,
    ) -> None:
        """
        Args:
            executed: never a fork of a process that has imported the supervisor.
        """
        self.executed = executed
        self.code = code
        """The folder that its packages are imported from."""
        self.cwd = cwd or (ROOT if code == ROOT else self.code.parent)
        self.server = server
        self.worker_id = worker_id
        self.home = home or short_dir()
        self.state_dir = self.home / "s"
        self.results_dir = self.home / "results"
        self.log = self.home / "node.log"
        self.args = list(args)
        self.env = {"HEARTBEAT_INTERVAL_SEC": "1", **(env or {})}
        if config:
            (self.home / "node.toml").write_text(config)
            self.args += ["--config", str(self.home / "node.toml")]
        self.process: node_zygote.Process | None = None
        self.wrapper: list[str] = []
        """A program that starts the node with fewer rights, and its arguments."""

    def flags(self) -> list[str]:
        """What it is told on its command line, over what its file says."""
        permits = ["--set", f"tasks.read_roots={','.join(PERMITS.read_roots)}", "--set", "tasks.local_hosts=*"]
        return [
            "--redis-url", self.server.url, "--state-dir", str(self.state_dir),
            "--results-dir", str(self.results_dir), "--worker-id", self.worker_id,
            # Before the others: a test may set it.
            *(("--set", "processes.warm_max_mb=0") if self.code == ROOT else ()),
            *(permits if self.code == ROOT else ()),
        ]  # fmt: skip

    def start(self, *, wait: bool = True) -> Node:
        arguments = [*self.flags(), *self.args]
        command = [*self.wrapper, sys.executable, "-m", node_zygote.MODULE, *arguments]
        paths = filter(None, [str(self.code), os.environ.get("PYTHONPATH")])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self.env}
        env.pop("REDIS_URL", None)
        env |= {name: value for name, value in self.env.items() if name == "REDIS_URL"}
        executed = self.executed or self.code != ROOT or self.cwd != ROOT or self.wrapper
        with open(self.log, "ab") as log:
            forked = None if executed else node_zygote.start(arguments, env, self.cwd, log.fileno())
            self.process = forked or subprocess.Popen(
                command,
                cwd=self.cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.wait_status("IDLE", "RUNNING")
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def wait_status(self, *words: str, deadline_s: float = DEADLINE_S) -> None:
        client = self.server.client()

        def there() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the node ended with {self.process.returncode}:\n{self.text()}")
            status, pid = client.hmget(f"worker:{self.worker_id}", "status", "pid")
            return status is not None and status.decode() in words and pid == str(self.pid).encode()

        until(there, f"status {words}", deadline_s)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def metric(self, series: str) -> float | None:
        """A sample of its metrics, by its name and labels as they are written."""
        lines = self.ask(op="metrics")["text"].splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{series} ")), None)

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request on the control socket."""
        import socket

        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(self.state_dir / "run" / "control.sock"))
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile() as lines:
                return dict(json.loads(lines.readline()))

    def task_pid(self, task_id: str) -> int:
        """The pid of a running task's first process."""

        def pid() -> int | None:
            tasks = self.ask(op="status")["tasks"]
            return next((task["pid"] for task in tasks if task["task_id"] == task_id and task["pid"]), None)

        return int(until(pid, f"{task_id} has a process"))

    def servers(self) -> list[int]:
        """The pids of its fork servers."""
        return [server["pid"] for server in self.ask(op="status")["servers"]]

    def stop(self, number: int = signal.SIGTERM, wait_s: float = 30.0) -> int:
        assert self.process is not None
        return end_process(self.process, number, wait_s)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it with all that it may have left, and say what that was."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            self.process.send_signal(signal.SIGTERM)
            end_process(self.process, signal.SIGTERM)
        for pid in with_mark(str(self.home)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        remove_path(self.home)  # at any depth

    def result(self, task_id: str) -> Any:
        return json.loads((self.results_dir / task_id / "responses.json").read_text())


@contextlib.contextmanager
def running(node: Node) -> Iterator[Node]:
    try:
        yield node.start()
    except BaseException:
        print(node.text()[-8000:])
        raise
    finally:
        node.close()
