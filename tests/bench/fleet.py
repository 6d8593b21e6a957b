"""The queue: beside direct dispatches, with four nodes, and what Redis has to do for a thousand slots."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from flowmesh.client import Client
from flowmesh.queue import scripts
from flowmesh.queue.classes import class_of
from tests.bench.measure import ECHO, Row, cpu_s, deployment, percentile, publish_to_end, spread, timed
from tests.kit.fake_node import register
from tests.kit.support import Node, Orchestrator, RedisServer

SLOTS = 1000
OWNERS = 20
POLL_S = 6.0
"""The mean pause between two looks of an idle node; see orchestrator.claims."""


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    return [*_overhead(50 if quick else 200), *_four_nodes(100 if quick else 400), *_redis(2 if quick else 10)]


def _overhead(count: int) -> list[Row]:
    with deployment("--log-level", "WARNING") as (node, peer), Client(node.server.url) as client:

        def queued() -> None:
            task_id = client.queue(ECHO).task_id
            peer.wait_end(task_id)

        direct, through = [], []
        for index in range(count + 5):
            seconds = publish_to_end(peer, ECHO["spec"]), timed(queued)
            if index >= 5:
                direct.append(seconds[0])
                through.append(seconds[1])
    ratio = percentile(through, 0.5) / percentile(direct, 0.5)
    return [
        Row(
            f"echo, {count} one after another through the queue: queue → TASK_SUCCEEDED (p50 / p95 / p99)",
            spread(through),
            f"{ratio:.2f} × direct dispatches in turn with them ({spread(direct)})",
        )
    ]


@contextlib.contextmanager
def _fleet(size: int) -> Iterator[tuple[Client, Orchestrator]]:
    server = RedisServer()
    nodes = [Node(server, "--log-level", "WARNING", worker_id=f"w{number}") for number in range(size)]
    try:
        for node in nodes:
            node.start()
        with Client(server.url) as client:
            yield client, Orchestrator(server)
    finally:
        for node in nodes:
            node.close()
        server.close()


def _four_nodes(count: int) -> list[Row]:
    rates = []
    for size in (1, 4):
        with _fleet(size) as (client, peer):
            began = time.perf_counter()
            ids = {client.queue(ECHO).task_id for _ in range(count)}
            while ids:
                peer.hear(1.0)
                ids -= {event["task_id"] for event in peer.task_events if event["type"] == "TASK_SUCCEEDED"}
                peer.task_events.clear()
            rates.append(count / (time.perf_counter() - began))
    one, four = rates
    return [
        Row(
            f"echo, {count} queued at once, 4 nodes on this machine",
            f"{four:.0f} tasks/s",
            f"{four / one:.2f} × 1 node ({one:.0f})",
        )
    ]


def _redis(rounds: int) -> list[Row]:
    """Simulated slots: each claims a task, journals it, and reports its start and its end."""
    server = RedisServer()
    raw = server.client()
    workers = [f"w{number}" for number in range(SLOTS)]
    try:
        for worker in workers:
            register(raw, worker, types=["echo"])
        assert server.process is not None
        key = class_of(ECHO).key
        loaded = {
            script: raw.script_load(script.text) for script in (scripts.CLAIM, scripts.JOURNALLED, scripts.REPORT)
        }
        wall = {"queue": 0.0, "claim": 0.0, "rest": 0.0}
        cpu = dict(wall)

        @contextlib.contextmanager
        def counted(what: str) -> Iterator[None]:
            began, before = time.perf_counter(), cpu_s(server.process.pid)
            yield
            wall[what] += time.perf_counter() - began
            cpu[what] += cpu_s(server.process.pid) - before

        def run_all(calls: list[tuple[Any, ...]]) -> list[Any]:
            answers = []
            for at in range(0, len(calls), 50):
                with raw.pipeline(transaction=False) as pipe:
                    for script, *arguments in calls[at : at + 50]:
                        pipe.evalsha(loaded[script], 0, *arguments)
                    answers += pipe.execute()
            return answers

        with Client(server.url) as client:
            for _ in range(rounds):
                with counted("queue"):
                    for number in range(SLOTS):
                        client.queue({**ECHO, "metadata": {"owner": f"o{number % OWNERS}"}}, anyway=True)
                with counted("claim"):
                    got = run_all([(scripts.CLAIM, worker, worker, "now", "", "", "", key) for worker in workers])
                tasks = [(answer[1].decode(), answer[2], worker) for answer, worker in zip(got, workers, strict=True)]
                event = json.dumps({"type": "TASK_SUCCEEDED", "task_id": "t", "worker_id": "w", "payload": {}})
                with counted("rest"):
                    run_all([(scripts.JOURNALLED, task, attempt) for task, attempt, _ in tasks])
                    run_all([(scripts.REPORT, task, n, w, w, "started", event, "now") for task, n, w in tasks])
                    ends = (1, "ok", 0, "", "{}", '{"ok": true}', 86400, 0, 0)
                    run_all([(scripts.REPORT, task, n, w, w, "end", event, "now", *ends) for task, n, w in tasks])
        before, looks = cpu_s(server.process.pid), 10 * SLOTS
        run_all([(scripts.CLAIM, worker, worker, "now", "", "", "", key) for worker in workers * 10])
        idle_s = (cpu_s(server.process.pid) - before) / looks
    finally:
        server.close()
    count = rounds * SLOTS
    whole_s = (cpu["claim"] + cpu["rest"]) / count
    return [
        Row(
            f"one Redis, {SLOTS} simulated slots, {OWNERS} owners: claims",
            f"{count / wall['claim']:.0f}/s, Redis at {cpu['claim'] / wall['claim']:.0%} of a core",
            f"{cpu['claim'] / count * 1e6:.0f} µs of its CPU time for each",
        ),
        Row(
            "the same: claim, journalled, started, ended",
            f"{count / (wall['claim'] + wall['rest']):.0f} tasks/s",
            f"{whole_s * 1e6:.0f} µs of its CPU time for each task: at most {1 / whole_s:.0f} tasks/s",
        ),
        Row(
            f"the same while all {SLOTS} slots are idle",
            f"{SLOTS / POLL_S * idle_s:.2%} of a core",
            f"{idle_s * 1e6:.0f} µs for a look that finds nothing, one in {POLL_S:g} s for each slot",
        ),
    ]
