"""Fixtures that start the real parts."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.kit.support import Node, Orchestrator, RedisServer

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts background jobs so. The programs that the tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

gc.disable()  # until the tests begin: what is imported stays, and looking through it again and again takes seconds

settings.register_profile("machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("machine")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture
def orchestrator(redis_server: RedisServer) -> Iterator[Orchestrator]:
    peer = Orchestrator(redis_server)
    yield peer
    peer.close()


@pytest.fixture
def make_node(redis_server: RedisServer, request: pytest.FixtureRequest) -> Iterator[Callable[..., Node]]:
    """Makes nodes, started; all of them are ended with the test, and their logs shown where it failed."""
    nodes: list[Node] = []

    def make(*args: str, start: bool = True, **options: Any) -> Node:
        node = Node(redis_server, *args, **options)
        nodes.append(node)
        return node.start() if start else node

    yield make
    failed = getattr(request.node, "failed", False)
    for node in nodes:
        if failed and node.log.exists():
            print(f"--- {node.worker_id}\n{node.text()[-6000:]}")
        node.close()


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    return make_node()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call":
        item.failed = report.failed  # type: ignore[attr-defined]
