"""Fixtures of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.process.gpu_node import GpuNode, MakeGpuNode, started
from tests.support import RedisServer


@pytest.fixture
def gpu_node(redis_server: RedisServer, request: pytest.FixtureRequest) -> Iterator[MakeGpuNode]:
    """Makes and starts nodes with stub GPUs; they are stopped at the end of the test."""
    nodes: list[GpuNode] = []

    def make(**options: object) -> GpuNode:
        return started(redis_server, nodes, **options)

    yield make
    for node in nodes:
        if getattr(request.node, "failed", False) and node.log.exists():
            print(node.text()[-6000:])
        node.close()
