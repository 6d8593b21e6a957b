"""What counts as too little GPU memory, and what the fork servers' canary makes of GPUs that others fill."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from flowmesh.messages.job import Fault, Job
from runners import canary, child
from runners.api import Context
from runners.gpu_memory import is_shortage

FULL = RuntimeError("CUDA error: out of memory")
HELD = RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")
BROKEN = RuntimeError("CUDA error: an illegal memory access was encountered")


class OutOfMemoryError(RuntimeError):
    """Torch's is called so."""


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("whatever"),
        FULL,
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ValueError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."),
    ],
)
def test_libraries_say_it_in_many_ways(error: Exception) -> None:
    assert is_shortage(error)
    outcome = child.run(job(), Raises(job(), error))
    assert outcome.fault is Fault.GPU_OOM


@pytest.mark.parametrize("error", [BROKEN, MemoryError("out of memory"), RuntimeError("no room")])
def test_other_errors_are_none(error: Exception) -> None:
    assert not is_shortage(error)


def job() -> Job:
    return Job(
        attempt=1, task_id="t", task_type="t", runner=f"{__name__}:Raiser", task={"spec": {}},
        out_dir="", results_dir="", cache_dir="", tmp_dir="",
    )  # fmt: skip


class Raises(Context):
    def __init__(self, job: Job, error: Exception) -> None:
        super().__init__(job)
        self.error = error


class Raiser:
    def run(self, ctx: Raises) -> None:
        raise ctx.error


class Ones:
    def __matmul__(self, _other: Ones) -> Ones:
        return self

    def sum(self) -> float:
        return 512.0**3


def machine(monkeypatch: pytest.MonkeyPatch, *gpus: Exception | None) -> list[str]:
    """Torch on a machine with these GPUs, each with what happens on it; the devices that are tried."""
    tried: list[str] = []

    def ones(*_shape: int, device: str) -> Ones:
        tried.append(device)
        if device != "cpu" and (error := gpus[int(device.partition(":")[2])]) is not None:
            raise error
        return Ones()

    cuda = SimpleNamespace(is_available=lambda: bool(gpus), device_count=lambda: len(gpus))
    torch = SimpleNamespace(set_num_threads=lambda _count: None, cuda=cuda, ones=ones)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delitem(sys.modules, "tokenizers", raising=False)
    return tried


def test_the_canary_takes_the_first_gpu_that_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = machine(monkeypatch, FULL, HELD, None, None)
    canary.check()
    assert tried == ["cpu", "cuda:0", "cuda:1", "cuda:2"]


def test_gpus_that_others_fill_are_no_fault_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, FULL, FULL)
    canary.check()


def test_a_gpu_that_fails_otherwise_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, BROKEN, None)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        canary.check()
