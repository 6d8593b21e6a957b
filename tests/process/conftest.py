"""Fixtures of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.gpu_node import GpuNode, MakeGpuNode, started
from tests.kit.support import RedisServer
from tests.kit.upload import SIZE


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


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A task's folder with a log."""
    folder = tmp_path / "results" / "t-1"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "task.log").write_text("line\n")
    return folder


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """An attempt's spool folder."""
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A file of SIZE random bytes."""
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(SIZE))
    return path
