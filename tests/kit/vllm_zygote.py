"""vLLM's fork server for tests: a process that has imported it, and runs tasks in forks of itself, as a node does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from flowmesh.messages.job import Fault
from flowmesh.processes.environ import SERVER
from runners.api import BadRequest, Context, RunnerError
from tests.kit.paths import ROOT


class Zygote:
    """The fork server, and its answers as results or exceptions."""

    def __init__(self) -> None:
        env = {**os.environ, **SERVER, "PYTHONPATH": str(ROOT)}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.kit.inference_zygote", "VLLM"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            cwd=ROOT,
        )
        ready, threads, cuda = self._line().split()
        assert ready == "ready"
        self.threads = int(threads)
        """Native ones, once everything is imported."""
        self.cuda = cuda == "True"
        """Whether it has a CUDA context then."""
        self.imported: list[str] = []
        """Modules that the last task imported in its child."""

    def close(self) -> None:
        self._server.communicate(timeout=60)

    def __call__(self, context: Context, while_running: Callable[[int], None] | None = None) -> dict[str, Any]:
        answer = context.tmp_dir / f"answer-{time.monotonic_ns()}"
        assert self._server.stdin is not None
        self._server.stdin.write(msgspec.json.encode([context.job, str(answer)]) + b"\n")
        self._server.stdin.flush()
        pid = int(self._line())
        if while_running is not None:
            while_running(pid)
        assert self._line() == "ended"
        said = msgspec.json.decode(answer.read_bytes())
        if said.get("error") == "bug":
            pytest.fail(said["message"])
        if "error" in said:
            raise (BadRequest if said["fault"] == Fault.BAD_REQUEST else RunnerError)(said["message"])
        self.imported = said["imported"]
        return said["result"]

    def _line(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().decode().strip()
