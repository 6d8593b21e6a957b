"""How far one Redis reaches: a thousand nodes with the node's own code for Redis, and what a task costs.

Every node receives every dispatch and every worker's event. A thousand nodes at a hundred tasks a second are 500 MB/s,
more than a small machine can receive; so costs are measured by the message, at several sizes and rates, and added up.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flowmesh.bus.stream import FIELD, stream_key
from flowmesh.client import Client
from flowmesh.messages.wire import EVENTS_CHANNEL, WorkerEvent, encode, utc_now
from tests.bench.measure import ECHO, Row, cpu_s, ms, percentile
from tests.bench.ratios import slope
from tests.bench.wire_nodes import INTERVAL_S
from tests.kit.paths import ROOT
from tests.kit.support import Orchestrator, RedisServer, until

DOCUMENT_BYTES = 5000
RATE = 100.0
"""Tasks a second that the costs are added up for."""
NODES = 1000
STATUSES = 2
"""Events of the worker that each task brings: it runs, it is idle."""
FULL = 0.7
"""The share of a core up to which a Redis is worth using: it has one thread for commands."""
MOST_MEMORY = 2 << 30
"""Of Redis: what subscribers have not read yet is in its memory."""


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    seconds = 3.0 if quick else 10.0
    counts = (20, 40, 80) if quick else (100, 300, 1000)
    dispatch, event = (_fan_out(counts, message, seconds) for message in (_task("nobody"), _status("nobody")))
    node = _node_costs(10 if quick else 20, seconds)
    whole = _Whole(100 if quick else NODES, seconds)
    return [*dispatch.rows("5 KB dispatch"), *event.rows("300 B event"), *node.rows(), *whole.rows(),
            *_reach(dispatch, event, node, whole)]  # fmt: skip


@dataclass(frozen=True)
class Delivery:
    """What it costs Redis to pass one message on, by the number of subscribers."""

    each_s: dict[int, float]
    rates: dict[int, float]
    shares: dict[int, float]
    per_s: float
    """Of one more subscriber, from the line through all sizes."""
    error_s: float

    def rows(self, what: str) -> list[Row]:
        most = max(self.each_s)
        sizes = ", ".join(f"{count}: {1e6 * each:.2f} µs" for count, each in self.each_s.items())
        return [
            Row(
                f"Redis, CPU time of a {what} for one more subscriber",
                f"{1e6 * self.per_s:.2f} ± {1e6 * self.error_s:.2f} µs",
                f"for each of {sizes}; with {most}: {self.rates[most]:.0f}/s, {self.shares[most]:.0%} of a core",
                number=self.per_s,
            )
        ]


def _fan_out(counts: tuple[int, ...], message: bytes, seconds: float) -> Delivery:
    channel = EVENTS_CHANNEL if b'"STATUS"' in message else "tasks"
    each_s, rates, shares, costs = {}, {}, {}, {}
    for count in counts:
        with _server() as server, _program("tests.bench.sinks", str(server.path), str(count), channel):
            before, began = cpu_s(_pid(server)), time.monotonic()
            publish = functools.partial(server.client().publish, channel, message)
            sent = _paced(RATE, seconds, publish, functools.partial(_fits, server))
            until(functools.partial(_is_through, server), "everything is delivered", 120)
            took_s, used_s = time.monotonic() - began, cpu_s(_pid(server)) - before
            costs[count] = used_s / sent
            each_s[count], rates[count], shares[count] = used_s / sent / count, sent / took_s, used_s / took_s
    line = slope(list(costs), list(costs.values()))
    return Delivery(each_s, rates, shares, line.per_step, line.error)


@dataclass(frozen=True)
class NodeCosts:
    """CPU time of one node."""

    rest: float
    """The share of a core without any message."""
    dispatch_s: dict[float, float]
    event_s: dict[float, float]
    """For a message that is not for it, by how many come in a second."""

    def rows(self) -> list[Row]:
        def by_rate(costs: dict[float, float]) -> str:
            return ", ".join(f"{1e6 * cost:.0f} µs at {rate:.0f}/s" for rate, cost in costs.items())

        return [
            Row("a node, share of a core without messages", f"{self.rest:.3%}", number=self.rest),
            Row("a node, CPU time of a 5 KB dispatch for another one", by_rate(self.dispatch_s)),
            Row("a node, CPU time of another one's 300 B event", by_rate(self.event_s)),
        ]


def _node_costs(count: int, seconds: float) -> NodeCosts:
    with _server() as server, _nodes(server, 0, count) as pid:
        redis = server.client()

        def share(rate: float, send: Callable[[], object]) -> tuple[float, int]:
            before, began = cpu_s(pid), time.monotonic()
            sent = _paced(rate, seconds, send, lambda: True) if rate else 0
            time.sleep(max(0.5, began + seconds - time.monotonic()))
            return (cpu_s(pid) - before) / count / (time.monotonic() - began), sent

        rest, _ = share(0, lambda: None)
        costs: list[dict[float, float]] = []
        for channel, message in (("tasks", _task("nobody")), (EVENTS_CHANNEL, _status("nobody"))):
            found = {}
            for rate in (RATE / 4, RATE / 2, RATE, 2 * RATE):
                began = time.monotonic()
                used, sent = share(rate, functools.partial(redis.publish, channel, message))
                found[rate] = max(0.0, used - rest) * (time.monotonic() - began) / sent
            costs.append(found)
    return NodeCosts(rest, *costs)


class _Whole:
    """All nodes at once, with few tasks: by the channel, by a stream of each worker, and from the queue."""

    WAYS = ("channel", "streams", "queue")

    def __init__(self, count: int, seconds: float) -> None:
        self.count = count
        self.rate = 4.0
        self.redis_s: dict[str, float] = {}
        self.lines: list[Row] = []
        with _server() as server, contextlib.ExitStack() as stack:
            each = (count + 3) // 4
            pids = [stack.enter_context(_nodes(server, first, each)) for first in range(0, 4 * each, each)]
            self.count = 4 * each
            peer, client = Orchestrator(server), stack.enter_context(Client(server.url))
            self._server, self._pids, self._peer, self._seconds = server, pids, peer, 2 * seconds
            time.sleep(seconds)
            self.rest = self._measured(lambda: None)
            sends = self._channel(peer), self._streams(server), self._queue(client)
            for way, send in zip(self.WAYS, sends, strict=True):
                self._measured(send, way)

    def rows(self) -> list[Row]:
        return self.lines

    def _measured(self, send: Callable[[], str | None], way: str = "") -> float:
        """Redis' share of a core. With a way: also what a task adds to it."""
        server, pids, peer = self._server, self._pids, self._peer
        redis = server.client()
        before, began = (cpu_s(_pid(server)), sum(map(cpu_s, pids)), redis.info("stats")), time.monotonic()
        sent_at: dict[str, float] = {}
        taken: list[float] = []

        def heard() -> None:
            peer.hear()
            now = time.monotonic()
            for event in peer.task_events:
                if event["type"] == "TASK_SUCCEEDED" and (at := sent_at.pop(event["task_id"], None)):
                    taken.append(now - at)
            peer.task_events.clear()
            peer.worker_events.clear()

        def one() -> None:
            if task_id := send():
                sent_at[task_id] = time.monotonic()

        sent = _paced(self.rate, self._seconds, one, lambda: True, meanwhile=heard)
        end = time.monotonic() + 120
        while sent_at and time.monotonic() < end:
            heard()
            time.sleep(0.005)
        if sent_at:
            raise RuntimeError(f"{len(sent_at)} of {sent} tasks have not ended ({way})")
        took_s = time.monotonic() - began
        share = (cpu_s(_pid(server)) - before[0]) / took_s
        node = (sum(map(cpu_s, pids)) - before[1]) / took_s / self.count
        after = redis.info("stats")
        out = (after["total_net_output_bytes"] - before[2]["total_net_output_bytes"]) / took_s
        what = f"{self.count} nodes, {self.rate:g} tasks/s of 5 KB by {way}" if way else f"{self.count} nodes at rest"
        against = f"Redis sends {out / 1e6:.2f} MB/s"
        if way:
            self.redis_s[way] = max(0.0, share - self.rest) * took_s / sent
            against += (
                f"; {1e3 * self.redis_s[way]:.2f} ms of its CPU time a task; end after {ms(percentile(taken, 0.5))}"
            )
        self.lines.append(Row(what, f"Redis {share:.1%}, a node {node:.3%} of a core", against))
        return share

    def _worker(self) -> str:
        return f"w{random.randrange(self.count)}"

    def _channel(self, peer: Orchestrator) -> Callable[[], str]:
        return lambda: peer.dispatch(self._worker(), {"taskType": "echo", "text": "y" * DOCUMENT_BYTES})

    def _streams(self, server: RedisServer) -> Callable[[], str]:
        redis = server.client()

        def send() -> str:
            worker = self._worker()
            message = _task(worker)
            redis.xadd(stream_key(worker), {FIELD: message})
            return str(json.loads(message)["task_id"])

        return send

    def _queue(self, client: Client) -> Callable[[], str]:
        document = {"spec": {**ECHO["spec"], "text": "y" * DOCUMENT_BYTES}}
        return lambda: client.queue(document, anyway=True).task_id


def _reach(dispatch: Delivery, event: Delivery, node: NodeCosts, whole: _Whole) -> list[Row]:
    """Added up for RATE tasks/s; the costs by the message, and what a node costs Redis at rest, are from above."""
    per_node = whole.rest / whole.count
    rows = []
    for way in _Whole.WAYS:
        messages = dispatch.per_s if way == "channel" else 0.0
        by_node = RATE * (messages + STATUSES * event.per_s) + per_node
        fan_out_s = (messages + STATUSES * event.per_s) * whole.count
        fixed = RATE * max(0.0, whole.redis_s[way] - fan_out_s)
        nodes = max(0.0, FULL - fixed) / by_node
        share = fixed + NODES * by_node
        rows.append(
            Row(
                f"added up: {NODES} nodes, {RATE:.0f} tasks/s by {way}",
                f"Redis {share:.0%} of a core",
                f"{FULL:.0%} of a core is reached with {nodes:.0f} nodes at {RATE:.0f} tasks/s",
                number=share,
            )
        )
    events = STATUSES * RATE + NODES / INTERVAL_S
    event_s = node.event_s[2 * RATE]
    for way, messages in (("channel", RATE * node.dispatch_s[RATE]), ("streams or queue", 0.0)):
        share = node.rest + messages + events * event_s
        rows.append(
            Row(f"added up: a node among them, by {way}", f"{share:.2%} of a core", aim="at most 1 %", number=share)
        )
    return rows


def _task(worker: str) -> bytes:
    task_id = f"task-{random.getrandbits(48):012x}"
    document = {"apiVersion": "flowmesh/v1", "kind": "Task", "spec": {"taskType": "echo", "text": "y" * DOCUMENT_BYTES}}
    message = {"task_id": task_id, "task": document, "task_type": "echo", "assigned_worker": worker,
               "dispatched_at": utc_now(), "parent_task_id": None}  # fmt: skip
    return json.dumps(message).encode()


def _status(worker: str) -> bytes:
    payload = {"task_id": "task-0123456789ab", "note": "n" * 80}
    return encode(WorkerEvent(type="STATUS", ts=utc_now(), worker_id=worker, status="RUNNING", payload=payload))


def _paced(
    rate: float,
    seconds: float,
    send: Callable[[], object],
    may: Callable[[], bool],
    meanwhile: Callable[[], object] = lambda: None,
) -> int:
    """Call `send` at a rate, or as often as `may` and the machine allow; returns how often."""
    due = began = time.monotonic()
    sent = 0
    while (now := time.monotonic()) < began + seconds:
        meanwhile()
        if now < due:
            time.sleep(min(0.005, due - now))
        elif may():
            send()
            sent += 1
            due = max(due + 1 / rate, now - 1.0)
    return sent


def _fits(server: RedisServer) -> bool:
    return int(server.client().info("memory")["used_memory"]) < MOST_MEMORY


def _is_through(server: RedisServer) -> bool:
    """Whether all has been read that was published."""
    return not any(int(client["omem"]) > 0 for client in server.client().client_list())


def _pid(server: RedisServer) -> int:
    assert server.process is not None
    return server.process.pid


@contextlib.contextmanager
def _server() -> Iterator[RedisServer]:
    server = RedisServer()
    try:
        server.client().config_set("client-output-buffer-limit", "pubsub 256mb 256mb 60")
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def _nodes(server: RedisServer, first: int, count: int) -> Iterator[int]:
    with _program("tests.bench.wire_nodes", server.url, str(first), str(count)) as pid:
        yield pid


@contextlib.contextmanager
def _program(*arguments: str) -> Iterator[int]:
    """A program of ours, ready; yields its pid."""
    command = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{arguments[0]} ended with {process.wait()}")
        yield process.pid
    finally:
        process.communicate()
