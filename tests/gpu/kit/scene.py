"""What the steps share: Redis, a node with the kit's task types, the GPU, its readings, and the rows of the report."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import redis

from flowmesh.cli.embedded import EmbeddedRedis
from flowmesh.errors import DeviceError
from flowmesh.node.devices import GpuInfo, GpuSample, visible_gpus
from flowmesh.node.nvml.client import Nvml
from flowmesh.tasks.catalogue import BUILTIN
from tests.gpu.kit import smi
from tests.gpu.kit.report import Row, Status
from tests.kit.support import Node, Orchestrator, until

MIB = 1 << 20
NODE_LOG_TAIL = 3000
BEAT_S = 1.0
CONFIG = f"""
[redis]
heartbeat_interval_s = {BEAT_S}
[processes]
adoption_timeout_s = 5.0
[tasks]
cancel_grace_s = 1.0
term_grace_s = 1.0
pass_env = ["FLOWMESH_NVML_STUB"]
[gpu]
sample_interval_s = 0.2
probe_interval_s = 1.0
[environments.torch]
preload = ["torch"]
[task_types.kit]
runner = "tests.gpu.kit.runners:KitRunner"
environment = "torch"
"""
MODEL_TYPES = ("inference", "sft", "lora_sft")
MODELS = """
[environments.models]
[task_types.kit_models]
runner = "tests.gpu.kit.runners:KitRunner"
environment = "models"
"""
NO_GPU = "w1-cpu"
"""The worker of the shared node without a GPU."""
VLLM = """
[environments.vllm]
preload = ["torch", "vllm"]
[task_types.kit_vllm]
runner = "tests.gpu.kit.runners:KitRunner"
environment = "vllm"
"""
T = TypeVar("T")


class Skip(Exception):
    """Raised by a step that cannot run here; the message says why."""


class Server(EmbeddedRedis):
    """The embedded Redis, as the nodes and peers of the tests take it."""

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket_path))


class Scene:
    def __init__(
        self, send: Callable[[dict[str, Any]], None], *, out: Path, scratch: Path, dry: bool, xid: bool
    ) -> None:
        self.out = out
        self.scratch = scratch
        self.dry = dry
        self.xid = xid
        self._send = send
        self._step = ""
        self._ends_at = 0.0
        self._stack = contextlib.ExitStack()
        self._nodes: list[Node] = []
        self._server: Server | None = None
        self._peer: Orchestrator | None = None
        self._node: Node | None = None
        self._loop = asyncio.Runner()
        self._nvml: Nvml | None = None
        self._gpus: tuple[GpuInfo, ...] | None = None

    # The report

    @contextlib.contextmanager
    def step(self, name: str, seconds: float) -> Iterator[None]:
        """Run a step: what it raises becomes a row, and the next step gets a new node then."""
        self._step, self._ends_at = name, time.monotonic() + seconds
        try:
            yield
        except Skip as skip:
            self.skip("the whole step", str(skip))
        except Exception as error:  # noqa: BLE001 - the boundary of a step: its error is its row
            where = traceback.format_exc()[-2000:]
            self.row(
                "the whole step", ok=False, why=f"{type(error).__name__}: {error}"[:1500], evidence={"where": where}
            )
            self.drop_node()

    @property
    def left_s(self) -> float:
        """Seconds that the step still has."""
        return self._ends_at - time.monotonic()

    def row(
        self,
        what: str,
        *,
        ok: bool | None,
        value: str = "",
        against: str = "",
        aim: str = "",
        why: str = "",
        evidence: dict[str, str] | None = None,
    ) -> None:
        """Send a row.

        Args:
            ok: None: a measurement of which nothing is demanded.
        """
        status = Status.NOTED if ok is None else Status.OK if ok else Status.FAILED
        evidence = dict(evidence or {})
        if status is Status.FAILED:
            evidence |= {"NVML": self.readings(), "nvidia-smi": smi.readings(), "nodes' log": self._node_log()}
        self._emit(
            Row(
                step=self._step,
                what=what,
                status=status,
                value=value,
                against=against,
                aim=aim,
                why=why or f"measured {value}, aim: {aim}" if status is Status.FAILED else why * (ok is None),
                evidence=evidence,
            )
        )

    def timing(self, what: str, *, ok: bool, **more: Any) -> None:
        """A row whose aim is a time or a speed: not judged in a dry run, whose machine computes on its CPU."""
        self.row(what, ok=None if self.dry else ok, **more)

    def skip(self, what: str, why: str) -> None:
        self._emit(Row(step=self._step, what=what, status=Status.SKIPPED, why=why))

    def _emit(self, row: Row) -> None:
        self._send({"row": asdict(row)})

    # The GPU

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(work)

    @property
    def nvml(self) -> Nvml:
        if self._nvml is None:
            self._nvml = Nvml()
        return self._nvml

    @property
    def gpus(self) -> tuple[GpuInfo, ...]:
        """The GPUs of the machine that CUDA_VISIBLE_DEVICES leaves.

        Raises:
            DeviceError: there is none, or the driver does not work.
        """
        if self._gpus is None:
            found = self.run(self.nvml.inventory())
            self._gpus = visible_gpus(found.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
            if not self._gpus:
                raise DeviceError(f"NVML finds no GPU here: {'; '.join(found.unusable) or 'no driver'}")
            machine = {
                "gpu": ", ".join(f"{gpu.name} ({gpu.memory_total_bytes / 2**30:.0f} GiB)" for gpu in self._gpus),
                "driver": found.driver_version or "?",
                "CUDA": found.cuda_version or "?",
            }
            self._send({"machine": machine})
        return self._gpus

    @property
    def gpu(self) -> GpuInfo:
        """The one that the steps use."""
        return self.gpus[0]

    @property
    def worker(self) -> str:
        """The id of the worker that has this GPU on the shared node."""
        return worker_of(self.gpu)

    def sample(self) -> GpuSample:
        """
        Raises:
            DeviceError: it does not answer.
        """
        look = self.run(self.nvml.sample([self.gpu.uuid]))[self.gpu.uuid]
        if not isinstance(look, GpuSample):
            raise DeviceError(f"{look.uuid} does not answer: {look.why}")
        return look

    def readings(self) -> str:
        """What NVML shows now, for evidence; why not, where it does not answer."""
        try:
            look = self.sample()
        except DeviceError as error:
            return str(error)
        return json.dumps({name: str(getattr(look, name)) for name in look.__struct_fields__}, indent=1)

    def size(self, wanted_bytes: float) -> int:
        """That many bytes of GPU memory, or what a smaller card can spare."""
        free_bytes = self.gpu.memory_total_bytes - self.sample().used_bytes
        return int(min(wanted_bytes, free_bytes * 0.8))

    # The node

    @property
    def server(self) -> Server:
        if self._server is None:
            self._server = self._stack.enter_context(Server())
        return self._server

    @property
    def peer(self) -> Orchestrator:
        if self._peer is None:
            self._peer = Orchestrator(self.server)
        return self._peer

    @property
    def node(self) -> Node:
        """The node that the steps share: a slot for each GPU, and one without."""
        if self._node is None:
            config = (VLLM if importlib.util.find_spec("vllm") else "") + MODELS
            config += "".join(f'[task_types.{name}]\nenvironment = "models"\n' for name in MODEL_TYPES)
            slots = {worker_of(gpu): f'"{gpu.uuid}"' for gpu in self.gpus} | {NO_GPU: ""}
            config += "".join(
                f'[[slots]]\nname = "{worker.removeprefix("w1-")}"\ngpus = [{listed}]\n'
                for worker, listed in slots.items()
            )
            self._node = self.start_node(config + without_heavy_types(MODEL_TYPES), worker=self.worker)
        return self._node

    def start_node(self, config: str, *, worker: str, **options: Any) -> Node:
        """Start a node with this configuration besides the kit's, and wait until `worker` is idle."""
        node = Node(self.server, config=CONFIG + config, **options)
        node.log = self.out / "node.log"
        self._nodes.append(node)
        node.start(wait=False)
        self.wait_word("IDLE", node, worker)
        return node

    def wait_word(self, word: str, node: Node | None = None, worker: str = "") -> None:
        """Wait for a status of `worker`; without one, of the shared node's.

        Raises:
            AssertionError: the worker does not get this status in the step's time, or the node ended.
        """
        node, worker = node or self.node, worker or self.worker
        client = self.server.client()

        def there() -> bool:
            assert node.process is not None
            assert node.process.poll() is None, f"the node ended: {self._node_log()[-1000:]}"
            return client.hget(f"worker:{worker}", "status") == word.encode()

        until(there, f"{worker} is {word}", max(self.left_s, 0))

    def drop_node(self, node: Node | None = None) -> None:
        """End a node (without one: the shared one), and what it may have left."""
        dropped = node or self._node
        if dropped is None:
            return
        if dropped is self._node:
            self._node = None
        self._nodes.remove(dropped)
        dropped.close()

    def dispatch(self, do: str, *, worker: str = "", task_type: str = "kit", **spec: Any) -> str:
        """Send one of the kit's own tasks (see tests.gpu.kit.runners) to a worker of the shared node.

        Returns:
            the task's id.
        """
        return self.send({"taskType": task_type, "do": do, "dry": self.dry, **spec}, worker)

    def send(self, spec: dict[str, Any], worker: str = "") -> str:
        """Send a task of any type; returns its id."""
        _ = self.node
        return self.peer.dispatch(worker or self.worker, spec)

    def end_of(self, task_id: str) -> dict[str, Any]:
        """The task's terminal event.

        Raises:
            AssertionError: there is none within the step's time; with the reason of a worker that starts nothing.
        """
        try:
            return self.peer.wait_end(task_id, max(self.left_s - 1, 0.1))
        except AssertionError as error:
            raise AssertionError(f"{error}; the worker: {self.reason() or 'has no reason'}") from None

    def reason(self) -> str:
        """Why the shared node's worker starts no task; empty if it does."""
        if self._node is None:
            return ""
        workers = self._node.ask(op="status")["workers"]
        return next((each["reason"] or "" for each in workers if each["worker_id"] == self.worker), "")

    def result(self, task_id: str, node: Node | None = None) -> dict[str, Any]:
        """The result of a task that must succeed.

        Raises:
            AssertionError: it failed.
        """
        end = self.end_of(task_id)
        assert end["type"] == "TASK_SUCCEEDED", f"{task_id}: {end.get('error')}"
        return dict((node or self.node).result(task_id))

    def wait_phase(self, task_id: str, phase: str, node: Node | None = None) -> None:
        """
        Raises:
            AssertionError: the task ended before, or did not get there in the step's time.
        """

        def there() -> bool:
            if ends := self.peer.ends(task_id):
                raise AssertionError(f"the task ended before it was {phase}: {ends[0].get('error')}")
            tasks = (node or self.node).ask(op="status")["tasks"]
            return any(task["task_id"] == task_id and task["phase"] == phase for task in tasks)

        until(there, f"{task_id} is {phase}", max(self.left_s, 0))

    def wait_released(self, used_bytes: int) -> float:
        """Seconds until no more than so many bytes (and the node's tolerance) are in use."""
        began = time.monotonic()
        until(lambda: self.sample().used_bytes <= used_bytes + 64 * MIB, "the GPU is empty", max(self.left_s, 0))
        return time.monotonic() - began

    def _node_log(self) -> str:
        with contextlib.suppress(OSError):
            return (self.out / "node.log").read_text(errors="replace")[-NODE_LOG_TAIL:]
        return ""

    def close(self) -> None:
        for node in list(self._nodes):
            self.drop_node(node)
        if self._peer is not None:
            self._peer.close()
        if self._nvml is not None:
            self.run(self._nvml.close())
        self._loop.close()
        self._stack.close()


def without_heavy_types(kept: tuple[str, ...] = ()) -> str:
    """Settings with which the environment `default` has no library to import: no step runs its types."""
    names = [each.name for each in BUILTIN if each.requires and each.name not in kept]
    return "".join(f'[task_types.{name}]\nrunner = "tests.gpu.kit.runners:KitRunner"\n' for name in names)


def software() -> dict[str, str]:
    """Versions, for the report's head."""
    names = ("torch", "transformers", "trl", "datasets", "peft", "vllm")
    found = {"CPUs": str(os.cpu_count()), "kernel": platform.release(), "Python": platform.python_version()}
    return found | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def worker_of(gpu: GpuInfo) -> str:
    """The worker of the shared node that has this GPU."""
    return f"w1-g{gpu.index}"


def percentiles(seconds: list[float]) -> str:
    """`p50 / p99` in milliseconds."""
    ordered = sorted(seconds)
    p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.99))
    return f"{p50 * 1000:.1f} / {p99 * 1000:.1f} ms"
