"""Shared by the GPU tests: a real node over a stub of the NVIDIA driver."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kit.nvml_stub.harness import Stub, library
from tests.kit.support import DEADLINE_S, Node, Orchestrator, RedisServer, until

MIB, GIB = 1 << 20, 1 << 30
A, B = "GPU-aaaa", "GPU-bbbb"
TWO_GPUS = f"""
    driver 580.65
    cuda 13000
    gpu {A} {80 * GIB} NVIDIA H100
    gpu {B} {80 * GIB} NVIDIA H100
    set {A} used {500 * MIB}
    set {B} used {500 * MIB}
    set {A} power 100000
    set {B} power 200000
    set {A} energy 1000000
    set {B} energy 1000000
"""
CONFIG = """
[environments.bare]
[task_types.look]
runner = "tests.kit.gpu_runners:LookRunner"
environment = "bare"
[gpu]
release_timeout_s = 0.5
probe_interval_s = 0.1
sample_interval_s = 0.1
canary = "tests.kit.gpu_runners:canary"
"""


class GpuNode(Node):
    """A node with stub GPUs; the stub can be changed while the node runs."""

    def __init__(self, server: RedisServer, script: str = TWO_GPUS, config: str = "", **options: Any) -> None:
        self.stub_dir = Path(tempfile.mkdtemp(prefix="fm-stub-"))
        self.stub = Stub(self.stub_dir / "script", script)
        paths = [str(library().parent), os.environ.get("LD_LIBRARY_PATH", "")]
        env = {
            "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
            "FLOWMESH_NVML_STUB": str(self.stub_dir / "script"),
            "HEARTBEAT_INTERVAL_SEC": "0.3",
            **options.pop("env", {}),
        }
        super().__init__(server, *options.pop("args", ()), env=env, config=CONFIG + config, **options)
        (self.home / "canary").write_text("good")

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.stub_dir, ignore_errors=True)

    def status(self, worker: str = "w1") -> str:
        word = self.server.client().hget(f"worker:{worker}", "status")
        return "" if word is None else word.decode()

    def wait_word(self, word: str, worker: str = "w1", deadline_s: float = DEADLINE_S) -> None:
        def there() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.text()
            return self.status(worker) == word

        until(there, f"{worker} is {word}; the node's log:\n{self.text()[-3000:]}", deadline_s)

    def hardware(self, worker: str = "w1") -> dict[str, Any]:
        return dict(json.loads(self.server.client().hget(f"worker:{worker}", "hardware_json")))

    def reason(self, worker: str = "w1") -> str:
        workers = self.ask(op="status")["workers"]
        return next(each["reason"] or "" for each in workers if each["worker_id"] == worker)

    def wait_reason(self, part: str, worker: str = "w1") -> str:
        until(lambda: part in self.reason(worker), f"{worker} is closed because of {part!r}")
        return self.reason(worker)

    def let_go(self, task_id: str) -> None:
        (self.results_dir / task_id / "go").touch()


MakeGpuNode = Callable[..., GpuNode]


def started(
    server: RedisServer, nodes: list[GpuNode], *, wait: str | None = "IDLE", worker: str = "w1", **options: Any
) -> GpuNode:
    """Start a node and wait for the worker's status `wait`. It is added to `nodes` before anything can fail."""
    node = GpuNode(server, **options)
    nodes.append(node)
    node.start(wait=False)
    if wait is not None:
        node.wait_word(wait, worker)
    return node


def held(orchestrator: Orchestrator, node: GpuNode, worker: str = "w1", **spec: Any) -> tuple[str, int]:
    """Dispatch a task that runs until `let_go`; returns its id and its pid once its runner is running."""
    task_id = orchestrator.dispatch(worker, {"taskType": "look", "wait": True, **spec})
    orchestrator.wait_started(task_id)
    pid = node.task_pid(task_id)
    until(lambda: phase_of(node, task_id) == "ready", "its runner is running")
    return task_id, pid


def phase_of(node: GpuNode, task_id: str) -> str:
    return next((task["phase"] for task in node.ask(op="status")["tasks"] if task["task_id"] == task_id), "")


def samples(node: GpuNode, count: int = 3) -> None:
    """Wait until the node has sampled its GPUs a few times (the interval is 0.1 s)."""
    time.sleep(0.1 * (count + 1))
