"""A Redis, a node and a folder with copies of conf/flows, for the tests of one engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh.client import Client, TaskState
from tests.kit.paths import CONF, ROOT
from tests.kit.support import Node, RedisServer, end_process, running, until

START_S = 200.0
"""How long an engine may take to start on a machine that is busy with other tests: its imports are large."""


class Place:
    """Where a user's programs are: copies of the examples and of the tests' flows, and a queue with one node."""

    def __init__(self, folder: Path, client: Client, url: str) -> None:
        self.folder = folder
        self.client = client
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "REDIS_URL": url, "DO_NOT_TRACK": "1"}
        self._processes: list[subprocess.Popen[bytes]] = []
        for path in (*(CONF / "flows").glob("*.py"), *Path(__file__).parent.glob("*_of_tests.py")):
            shutil.copy(path, folder)

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        """A Python program in the folder; its output is in out.txt."""
        with open(self.folder / "out.txt", "ab") as out:
            process = subprocess.Popen([sys.executable, *args], cwd=self.folder, env=self.env, stdout=out, stderr=out)
        self._processes.append(process)
        return process

    def text(self) -> str:
        return (self.folder / "out.txt").read_text()

    def running(self) -> TaskState:
        """The one open task, once it runs."""
        found = lambda: next((task for task in self.client.tasks() if task.state == "running"), None)  # noqa: E731
        return until(found, "it runs", START_S)

    def close(self) -> None:
        for process in self._processes:
            end_process(process)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    server = RedisServer()
    node = Node(server, "--set", "tasks.allow_command=*")
    try:
        with running(node), Client(server.url) as client:
            made = Place(tmp_path_factory.mktemp("flows"), client, server.url)
            try:
                yield made
            finally:
                made.close()
                print(made.text()[-8000:])
    finally:
        server.close()
