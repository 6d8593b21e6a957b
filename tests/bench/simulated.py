"""A deployment of many nodes on one Redis: what a rate of tasks costs Redis, a simulated node and a real one.

Simulated nodes share processes, so they also share what it costs a process to wake up; one node in a process of its
own, a real one that gets no tasks, is beside them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flowmesh.bus.stream import FIELD, stream_key
from flowmesh.client import Client
from flowmesh.messages.wire import EVENTS_CHANNEL, WorkerEvent, encode, utc_now
from tests.bench.measure import cpu_s, own_bytes, percentile
from tests.bench.wire_nodes import INTERVAL_S, METRICS, SPEC
from tests.kit.paths import ROOT
from tests.kit.support import Node, Orchestrator, RedisServer

DOCUMENT_BYTES = 5000
TASK = {**SPEC, "text": "y" * DOCUMENT_BYTES}
KEPT_UP = 0.9
"""The part of the rate asked for that has to be reached."""
MOST_MEMORY = 2 << 30
"""Of Redis: what subscribers have not read yet is in its memory."""
DRAIN_S = 30.0
"""How long the tasks' ends are waited for, after the last one was sent."""
SETTLE_S = 5.0
"""After the start."""
PROCESSES = 2


@dataclass(frozen=True)
class Load:
    """What a rate of tasks costs; processor time as shares of a core."""

    asked: float
    """Tasks a second."""
    reached: float
    """Of those that ended, up to the end of the last one."""
    redis: float
    node: float
    """A simulated one, the mean."""
    real_node: float
    """Its supervisor."""
    machine: float
    """Share of all cores that were busy, with whatever."""
    out_bytes: float
    """What Redis sends in a second."""
    end_s: float
    """The median from sending a task to its end."""

    @property
    def kept_up(self) -> bool:
        return self.reached >= KEPT_UP * self.asked


@dataclass
class Deployment:
    """
    Args:
        server: its Redis.
        count: simulated nodes, w0 and on.
        pids: of the processes that they are in.
    """

    server: RedisServer
    count: int
    pids: list[int]
    real: Node
    peer: Orchestrator
    client: Client
    stack: contextlib.ExitStack
    readers: int = 0

    def add_readers(self, count: int) -> None:
        """Further subscribers, which read and do nothing else; their heartbeats are sent for them."""
        _ready(_start(self.stack, "sinks", self.server.path, count, "tasks", EVENTS_CHANNEL))
        self.readers += count

    @property
    def sends(self) -> dict[str, Callable[[], str]]:
        """By way: sends a task, and returns its id."""
        return {"channel": self._publish, "streams": self._add, "queue": self._queue}

    def node_bytes(self) -> float:
        """Memory of a simulated node."""
        return sum(map(own_bytes, self.pids)) / self.count

    def rest(self, seconds: float) -> Load:
        return self.measured(0.0, seconds, lambda: "")

    def measured(self, rate: float, seconds: float, send: Callable[[], str]) -> Load:
        """Send tasks at a rate, or as many as the machine and Redis' memory allow, and wait for their ends."""
        redis, sent_at, taken = self.server.client(), dict[str, float](), list[float]()
        self._hear(sent_at, taken)
        before, out, busy = self._cpu(), _out_bytes(self.server), _busy_s()
        began = looked = beat = time.monotonic()
        due, fits = began, True
        while (now := time.monotonic()) < began + seconds:
            self._hear(sent_at, taken)
            if now - looked > 0.25:
                looked, fits = now, redis.info("memory")["used_memory"] < MOST_MEMORY
            while self.readers and now >= beat:
                redis.publish(EVENTS_CHANNEL, _heartbeat())
                beat += INTERVAL_S / self.readers
            while rate and fits and now >= due:
                sent_at[send()] = time.monotonic()
                due = max(due + 1 / rate, now - 1.0)
            time.sleep(0.002)
        end = time.monotonic() + DRAIN_S
        while sent_at and time.monotonic() < end:
            self._hear(sent_at, taken)
            time.sleep(0.005)
        took_s, after = time.monotonic() - began, self._cpu()
        used = [(one - other) / took_s for one, other in zip(after, before, strict=True)]
        return Load(
            asked=rate,
            reached=len(taken) / took_s,
            redis=used[0],
            node=used[1] / self.count,
            real_node=used[2],
            machine=(_busy_s() - busy) / took_s / (os.cpu_count() or 1),
            out_bytes=(_out_bytes(self.server) - out) / took_s,
            end_s=percentile(taken, 0.5) if taken else 0.0,
        )

    def _hear(self, sent_at: dict[str, float], taken: list[float]) -> None:
        self.peer.hear()
        now = time.monotonic()
        for event in self.peer.task_events:
            if event["type"] == "TASK_SUCCEEDED" and (at := sent_at.pop(event["task_id"], None)):
                taken.append(now - at)
        self.peer.task_events.clear()
        self.peer.worker_events.clear()
        self.peer.told.clear()

    def _cpu(self) -> tuple[float, float, float]:
        assert self.server.process is not None
        return cpu_s(self.server.process.pid), sum(map(cpu_s, self.pids)), _exact_cpu_s(self.real.pid)

    def _worker(self) -> str:
        return f"w{random.randrange(self.count)}"

    def _publish(self) -> str:
        return self.peer.dispatch(self._worker(), TASK)

    def _add(self) -> str:
        worker, task_id = self._worker(), f"task-{random.getrandbits(48):012x}"
        document = {"apiVersion": "flowmesh/v1", "kind": "Task", "spec": TASK}
        message = {"task_id": task_id, "task": document, "task_type": "echo", "assigned_worker": worker,
                   "dispatched_at": utc_now(), "parent_task_id": None}  # fmt: skip
        self.peer.redis.xadd(stream_key(worker), {FIELD: json.dumps(message).encode()})
        return task_id

    def _queue(self) -> str:
        return self.client.queue({"spec": TASK}, anyway=True).task_id


@contextlib.contextmanager
def deployment(count: int) -> Iterator[Deployment]:
    """`count` simulated nodes and a real one, all subscribed."""
    with contextlib.ExitStack() as stack:
        server = RedisServer()
        stack.callback(server.close)
        server.client().config_set("client-output-buffer-limit", "pubsub 256mb 256mb 60")
        first, each = 0, (count + PROCESSES - 1) // PROCESSES
        programs = []
        while first < count:
            programs.append(_start(stack, "wire_nodes", server.url, first, min(each, count - first)))
            first += each
        pids = [_ready(program) for program in programs]
        options = ["--log-level", "WARNING", "--set", "processes.warm_max_mb=0"]
        real = Node(
            server, *options, worker_id="real", executed=True, env={"HEARTBEAT_INTERVAL_SEC": f"{INTERVAL_S:g}"}
        )
        stack.callback(real.close)
        real.start()
        peer, client = Orchestrator(server), stack.enter_context(Client(server.url))
        stack.callback(peer.close)
        time.sleep(SETTLE_S)
        yield Deployment(server, count, pids, real, peer, client, stack)


def _start(stack: contextlib.ExitStack, program: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"tests.bench.{program}", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.callback(process.communicate)  # the end of its input ends it
    return process


def _ready(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        raise RuntimeError(f"{process.args!r} ended with {process.wait()}")
    return process.pid


@functools.cache
def _heartbeat() -> bytes:
    return encode(WorkerEvent(type="HEARTBEAT", ts=utc_now(), worker_id="reader", metrics=METRICS))


def _out_bytes(server: RedisServer) -> int:
    return int(server.client().info("stats")["total_net_output_bytes"])


def _exact_cpu_s(pid: int) -> float:
    """Of a process' threads that live, by the nanosecond: a node at rest takes less than the kernel's ticks show."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def _busy_s() -> float:
    """Processor time that all programs of the machine have taken."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
