"""Nodes on machines of their own, far from Redis: on lines with latency and loss, and cut off from it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import pytest

from flowmesh.client import Client
from tests.kit.network import Line, Network, why_not
from tests.kit.support import Node, Orchestrator, RedisServer, until

pytestmark = [pytest.mark.redis, pytest.mark.skipif(bool(why_not()), reason=why_not())]
LINE = Line(delay_s=0.02, jitter_s=0.01, loss=0.01)
CONFIG = """
[queue]
take_over_after_s = 1.0

[redis]
timeout_s = 2.0

[task_types.misbehave]
runner = "tests.kit.runners_for_tests:MisbehavingRunner"
environment = "light"
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Redis on the first host, nodes on the others."""
    with contextlib.closing(Network(3, LINE)) as made:
        yield made


@pytest.fixture(scope="module")
def server(network: Network) -> Iterator[RedisServer]:
    with contextlib.closing(RedisServer(keep=True, host=network.hosts[0])) as made:
        yield made


@pytest.fixture(scope="module")
def nodes(network: Network, server: RedisServer) -> Iterator[dict[str, Node]]:
    with contextlib.ExitStack() as stack:
        made = {}
        for number, host in enumerate(network.hosts[1:], 1):
            node = Node(server, worker_id=f"w{number}", config=CONFIG)
            node.wrapper = host.enter
            made[node.worker_id] = node
            stack.callback(node.close)
            node.start(wait=False)
        for node in made.values():
            node.wait_status("IDLE")
        yield made


@pytest.fixture
def peer(server: RedisServer) -> Iterator[Orchestrator]:
    with contextlib.closing(Orchestrator(server)) as made:
        yield made


@pytest.fixture
def client(server: RedisServer) -> Iterator[Client]:
    with Client(server.near_url) as made:
        yield made


def test_tasks_end_once_over_lines_that_lose_packets(
    network: Network, nodes: dict[str, Node], client: Client, peer: Orchestrator
) -> None:
    ids = [client.queue({"spec": {"taskType": "echo", "delaySec": 0.05}}).task_id for _ in range(20)]
    ends = [client.wait(task, 60) for task in ids]
    assert [end.verdict for end in ends] == ["ok"] * 20
    assert {end.worker_id for end in ends} == set(nodes)
    peer.hear()
    assert set(Counter(event["task_id"] for event in peer.task_events).values()) == {2}  # started, and ended
    assert network.lost > 0


def test_a_node_that_is_cut_off_loses_its_task_and_stops_it(
    network: Network, server: RedisServer, nodes: dict[str, Node], client: Client, peer: Orchestrator
) -> None:
    task = client.queue({"spec": {"taskType": "misbehave", "do": "wait_for", "file": "go"}}, task_id="moves").task_id
    first = until(lambda: (found := client.state(task)) and found.state == "running" and found.worker_id, "it runs")
    (other,) = set(nodes) - {first}
    host = network.hosts[int(first[1:])]
    network.cut(host)

    def moved() -> bool:
        server.client().delete(f"worker:{first}:hb")  # as its time would end it; one may still have been on its way
        found = client.state(task)
        return found is not None and (found.state, found.worker_id) == ("running", other)

    until(moved, "it moved")
    network.mend(host)
    until(lambda: nodes[first].ask(op="status")["tasks"] == [], "the stale attempt is stopped")
    (nodes[other].results_dir / task / "go").touch()
    end = client.wait(task, 60)
    assert (end.ok, end.worker_id) == (True, other)
    assert [event["worker_id"] for event in peer.ends(task)] == [other]
