"""Tasks on several nodes on lines that lose packets: whoever is killed or cut off, each ends once and holds nothing."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter

import redis

from flowmesh.client import Client
from flowmesh.messages.nodes import gang_of_member
from tests.faults.rig import Lost, Rig
from tests.faults.table import fault, until
from tests.kit.network import Host, Line, Network
from tests.kit.support import Node, Orchestrator, RedisServer

GANGS = 24
NODES = 3
HOLD_S = 45.0
"""How long a member may hold its slot after its task has ended or waits again, on a node that is up and connected."""
END_S = 420.0
LINE = Line(delay_s=0.01, jitter_s=0.01, loss=0.01)
CONFIG = """
[queue]
take_over_after_s = 9.0

[redis]
timeout_s = 2.0

[tasks]
cancel_grace_s = 1.0
term_grace_s = 1.0
allow_command = ["*"]
"""


class Fleet:
    """A network with Redis on its first host and a node on each other one."""

    def __init__(self, seed: int) -> None:
        with contextlib.ExitStack() as stack:
            self.network = Network(NODES + 1, LINE, seed)
            stack.callback(self.network.close)
            self.server = RedisServer(keep=True, host=self.network.hosts[0])
            stack.callback(self.server.close)
            self.hosts: dict[str, Host] = {}
            self.nodes: dict[str, Node] = {}
            for number, host in enumerate(self.network.hosts[1:], 1):
                node = Node(self.server, worker_id=f"g{number}", config=CONFIG)
                stack.callback(node.close)
                node.wrapper = host.enter
                self.hosts[node.worker_id], self.nodes[node.worker_id] = host, node
                node.start(wait=False)
            for node in self.nodes.values():
                node.wait_status("IDLE")
            self.peer = Orchestrator(self.server)
            stack.callback(self.peer.close)
            self._stack = stack.pop_all()
        self.away: set[str] = set()
        """Nodes that are cut off or stopped now."""
        self._held: dict[tuple[str, str], float] = {}

    def close(self) -> None:
        self._stack.close()

    def members(self, worker_id: str) -> dict[str, int]:
        """The member tasks on a node, with their processes (0: none yet)."""
        try:
            tasks = self.nodes[worker_id].ask(op="status")["tasks"]
        except (OSError, ValueError):  # it was killed a moment ago, or is stopped
            return {}
        return {task["task_id"]: task["pid"] or 0 for task in tasks}

    def check_held(self, client: Client) -> None:
        """Check that no slot is held for longer than HOLD_S by a gang that has ended.

        Raises:
            Lost: naming it.
        """
        now, seen = time.monotonic(), set()
        for worker_id in self.nodes:
            if worker_id in self.away:
                continue
            for member in self.members(worker_id):
                task = client.state(gang_of_member(member))
                if task is not None and not task.ended and task.state != "queued":
                    continue
                seen.add((worker_id, member))
                if now - self._held.setdefault((worker_id, member), now) > HOLD_S:
                    raise Lost(f"{member} still holds its slot on {worker_id}, {HOLD_S:.0f} s after its task's end")
        self._held = {key: since for key, since in self._held.items() if key in seen}

    def hit(self, rng: random.Random) -> str:
        """Do something bad; returns what."""
        worker_id = rng.choice(list(self.nodes))
        node, host = self.nodes[worker_id], self.hosts[worker_id]
        what = rng.choice(["member", "member", "member", "node", "node", "redis", "cut", "stop"])
        match what:
            case "member":
                for pid in filter(None, self.members(worker_id).values()):
                    Rig.hit(pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
            case "node":
                node.kill()
                time.sleep(rng.choice([0, 0, 0.5, 6]))
                node.start(wait=False)
            case "redis":
                with contextlib.suppress(redis.RedisError):
                    self.peer.hear()
                self.server.stop(signal.SIGKILL)
                time.sleep(rng.uniform(0, 1))
                self.server.start()
                self.peer.reconnect(self.server)
            case "cut":
                self.network.cut(host)
                self._stay_away(worker_id, rng)
                self.network.mend(host)
            case _:
                Rig.hit(node.pid, signal.SIGSTOP)
                self._stay_away(worker_id, rng)
                Rig.hit(node.pid, signal.SIGCONT)
        return what

    def _stay_away(self, worker_id: str, rng: random.Random) -> None:
        self.away.add(worker_id)
        end = time.monotonic() + rng.choice([0.5, 2, 8])
        while time.monotonic() < end:
            self.peer.hear(0.1)
        self.away.discard(worker_id)


def gang(rng: random.Random) -> dict[str, object]:
    """A task on two or three nodes: it waits, or its members look for each other over the network."""
    nodes = rng.choice([2, 3, {"min": 1, "max": 3}, {"min": 2, "max": 3}])
    if rng.random() < 0.5:
        return {"taskType": "echo", "delaySec": rng.uniform(0.1, 2), "nodes": nodes}
    return {"taskType": "command", "script": MEET, "nodes": nodes}


MEET = """
exec python - <<'END'
import os, socket, time
host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if rank == 0:
    listener = socket.create_server((host, port))
    peers = [listener.accept()[0] for _ in range(size - 1)]
    assert all(peer.recv(1) for peer in peers), "a member is gone"
    for peer in peers: peer.sendall(b"x")
else:
    while True:
        try:
            peer = socket.create_connection((host, port), 5)
            break
        except OSError:
            time.sleep(0.1)
    peer.settimeout(None)
    peer.sendall(b"x")
    assert peer.recv(1), "the first member is gone"
END
"""
"""A barrier, which hangs without end where a member is lost without a word."""


@fault(
    "gangs: 24 on 3 nodes on bad lines; members, nodes, Redis SIGKILLed",
    weight=1,
    long=True,
    network=True,
)
def _(rig: Rig, rng: random.Random) -> None:
    fleet = Fleet(rng.getrandbits(32))
    try:
        _storm(fleet, rng)
    finally:
        fleet.close()


def _storm(fleet: Fleet, rng: random.Random) -> None:
    done: Counter[str] = Counter()
    with Client(fleet.server.near_url) as client:
        ids = [
            client.queue({"spec": gang(rng)}, task_id=f"gang{number}", retries=50).task_id for number in range(GANGS)
        ]
        end = time.monotonic() + END_S
        while any(not task.ended for task in client.tasks()):
            if time.monotonic() > end:
                left = [(task.task_id, task.state, task.worker_id) for task in client.tasks() if not task.ended]
                raise Lost(f"{len(left)} tasks have not ended after {dict(done)}: {left[:5]}")
            fleet.peer.hear()
            time.sleep(rng.uniform(0.2, 2.0))
            done[fleet.hit(rng)] += 1
            fleet.check_held(client)
        for worker_id, node in fleet.nodes.items():
            until(lambda node=node: _is_idle(node), f"{worker_id} holds nothing and has sent every event", HOLD_S)
        wrong = [task_id for task_id in ids if not client.wait(task_id, 10).ok]
    fleet.peer.hear()
    counts = Counter(event["task_id"] for event in fleet.peer.task_events if event["type"] != "TASK_STARTED")
    twice = [task_id for task_id, count in counts.items() if count > 1]
    left = [
        key.decode()
        for pattern in ("gang:*", "queue:gangs*")
        for key in fleet.server.client().keys(f"flowmesh:{pattern}")
    ]
    print(f"gangs: {dict(done)}, packets {fleet.network.passed}, lost {fleet.network.lost}", flush=True)
    if wrong or twice or left:
        raise Lost(f"not succeeded: {wrong[:5]}; ended twice: {twice[:5]}; left in Redis: {left[:5]}")


def _is_idle(node: Node) -> bool:
    try:
        status = node.ask(op="status")
    except (OSError, ValueError):
        return False
    return not status["tasks"] and not status["outbox"]
