"""vLLM's fork server for tests: a process that has imported it, and runs tasks in forks of itself, as a node does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from flowmesh.messages.job import Fault
from flowmesh.processes.environ import SERVER
from runners.api import BadRequest, Context, RunnerError
from tests.kit.paths import ROOT
from tests.kit.support import until


class Zygote:
    """The fork server, and its answers as results or exceptions."""

    def __init__(self) -> None:
        # two members of a task on several nodes would bind their threads to the same cores
        env = {**os.environ, **SERVER, "PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
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
        pid, answer = self._fork(context, waits=True)
        if while_running is not None:
            while_running(pid)
        assert self._line() == "ended"
        self.imported = msgspec.json.decode(answer.read_bytes()).get("imported", [])
        return _said(answer)

    def start(self, context: Context) -> Started:
        """Start it, and do not wait."""
        return Started(*self._fork(context, waits=False))

    def _fork(self, context: Context, *, waits: bool) -> tuple[int, Path]:
        answer = context.tmp_dir / f"answer-{time.monotonic_ns()}"
        assert self._server.stdin is not None
        self._server.stdin.write(msgspec.json.encode([context.job, str(answer), waits]) + b"\n")
        self._server.stdin.flush()
        return int(self._line()), answer

    def _line(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().decode().strip()


class Started(NamedTuple):
    """A run that nobody waits for yet."""

    pid: int
    answer: Path

    def result(self, deadline_s: float = 120.0) -> dict[str, Any]:
        """Its result, or its error raised."""
        until(self.answer.exists, f"an answer of {self.pid}", deadline_s)
        return _said(self.answer)


def _said(answer: Path) -> dict[str, Any]:
    said: dict[str, Any] = msgspec.json.decode(answer.read_bytes())
    if said.get("error") == "bug":
        pytest.fail(said["message"])
    if "error" in said:
        raise (BadRequest if said["fault"] == Fault.BAD_REQUEST else RunnerError)(said["message"])
    return dict(said["result"])
