"""Faults of a whole fleet: four nodes that share a queue, in a deployment of their own."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter
from pathlib import Path

import redis

from flowmesh.client import Client
from tests.faults.rig import Lost, Rig
from tests.faults.table import fault
from tests.kit.support import Node, Orchestrator, RedisServer, below, until

TASKS = 1000
NODES = 4
END_S = 300.0
CONFIG = """
[queue]
take_over_after_s = 1.0

[redis]
timeout_s = 2.0
"""


@fault("queue: 1,000 tasks on 4 nodes; nodes SIGKILLed, Redis restarted", weight=1, long=True)
def _(rig: Rig, rng: random.Random) -> None:
    server = RedisServer(keep=True)
    nodes = [Node(server, worker_id=f"q{number}", config=CONFIG) for number in range(NODES)]
    try:
        for node in nodes:
            node.start()
        _storm(server, nodes, rng)
    finally:
        for node in nodes:
            node.close()
        server.close()


def _storm(server: RedisServer, nodes: list[Node], rng: random.Random) -> None:
    peer = Orchestrator(server)
    with Client(server.url) as client:
        ids = [
            client.queue(
                {
                    "metadata": {"owner": rng.choice("abcd")},
                    "spec": {"taskType": "echo", "delaySec": rng.random() / 20},
                },
                priority=rng.choice(["high", "normal", "low"]),
                retries=20,
            ).task_id
            for _ in range(TASKS)
        ]
        end = time.monotonic() + END_S
        while any(not task.ended for task in client.tasks()):
            if time.monotonic() > end:
                left = [(task.task_id, task.state, task.worker_id) for task in client.tasks()]
                raise Lost(f"{len(left)} tasks have not ended: {left[:5]}")
            peer.hear()
            time.sleep(rng.uniform(0.1, 1.0))
            _hit(server, nodes, peer, rng)
        for node in nodes:
            until(lambda node=node: _has_sent_all(node), "every event is sent", 60.0)
        states = {task.task_id: task for task in client.tasks(all=True)}
        wrong = [task_id for task_id in ids if task_id not in states or not states[task_id].ok]
    peer.hear()
    counts = Counter(event["task_id"] for event in peer.task_events if event["type"] != "TASK_STARTED")
    twice = [task_id for task_id, count in counts.items() if count > 1]
    left = [
        key.decode()
        for pattern in ("held:*", "waiting", "c:*")
        for key in server.client().keys(f"flowmesh:queue:{pattern}")
    ]
    peer.close()
    if wrong or twice or left:
        raise Lost(f"not succeeded: {wrong[:5]}; ended twice: {twice[:5]}; left in Redis: {left[:5]}")


def _has_sent_all(node: Node) -> bool:
    try:
        return not node.ask(op="status")["outbox"]
    except OSError:  # it was killed a moment ago, and is not up yet
        return False


def _hit(server: RedisServer, nodes: list[Node], peer: Orchestrator, rng: random.Random) -> None:
    match rng.randrange(4):
        case 0:
            with contextlib.suppress(redis.RedisError):
                peer.hear()
            server.stop(signal.SIGKILL)
            time.sleep(rng.uniform(0, 0.5))
            server.start()
            peer.reconnect(server)
        case 1 | 2:
            node = rng.choice(nodes)
            node.kill()
            if rng.random() < 0.5:  # gone for long: another node takes its task over
                server.client().delete(f"worker:{node.worker_id}:hb")
                time.sleep(rng.uniform(1, 3))
            node.start(wait=False)
        case _:
            node = rng.choice(nodes)
            Rig.hit(node.pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0, 1.5))
            Rig.hit(node.pid, signal.SIGCONT)


@fault("pipelines: 20 on 4 nodes; drivers and nodes SIGKILLed, Redis restarted", weight=1, long=True)
def _(rig: Rig, rng: random.Random) -> None:
    server = RedisServer(keep=True)
    nodes = [Node(server, worker_id=f"p{number}", config=CONFIG) for number in range(NODES)]
    try:
        for node in nodes:
            node.start()
        _pipelines(server, nodes, rng)
    finally:
        for node in nodes:
            node.close()
        server.close()


PIPELINES = 20
STAGES = 6


def _pipelines(server: RedisServer, nodes: list[Node], rng: random.Random) -> None:
    """Each stage succeeds in one run, each pipeline ends once."""
    peer = Orchestrator(server)
    with Client(server.url) as client:
        ids = []
        for number in range(PIPELINES):
            stages = [
                {"name": f"s{each}", "spec": {"taskType": "echo", "delaySec": rng.random() / 2}}
                for each in range(STAGES)
            ]
            ids.append(client.submit({"spec": {"stages": stages}}, task_id=f"pipe{number}").task_id)
        end = time.monotonic() + END_S
        while any(not task.ended for task in client.tasks()):
            if time.monotonic() > end:
                left = [(task.task_id, task.state, task.worker_id) for task in client.tasks()]
                raise Lost(f"{len(left)} tasks have not ended: {left[:5]}")
            peer.hear()
            time.sleep(rng.uniform(0.1, 1.0))
            if rng.random() < 0.5:
                for pid in _drivers(rng.choice(nodes)):
                    Rig.hit(pid, signal.SIGKILL)
            else:
                _hit(server, nodes, peer, rng)
        for node in nodes:
            until(lambda node=node: _has_sent_all(node), "every event is sent", 60.0)
        wrong = [task_id for task_id in ids if not client.wait(task_id, 10).ok]
    peer.hear()
    counts = Counter(event["task_id"] for event in peer.task_events if event["type"] != "TASK_STARTED")
    twice = [task_id for task_id, count in counts.items() if count > 1]
    peer.close()
    if wrong or twice:
        raise Lost(f"not succeeded: {wrong[:5]}; ended twice: {twice[:5]}")


def _drivers(node: Node) -> list[int]:
    found = []
    for pid in below(node.pid):
        with contextlib.suppress(OSError):
            if b"flowmesh.pipeline_driver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found
