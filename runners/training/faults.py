"""Turns a library's exception into the task's error. Out of memory has its own fault, since a retry may help."""

from __future__ import annotations

import re

from flowmesh.messages.job import Fault
from runners.api import RunnerError
from runners.gpu_memory import is_shortage

_HOST = re.compile(r"DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|bad_alloc", re.IGNORECASE)
_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|NCCL|gloo|Socket Timeout|wait timeout|TCPStore|"
    r"DistNetworkError|DistStoreError|DistBackendError|No backend type associated",
    re.IGNORECASE,
)

TRACKERS = frozenset(("wandb", "mlflow", "trackio"))
"""Libraries whose errors are about their server: no login, not reachable."""
SMALLER = "lower spec.training.batch_size or max_seq_length, or use gradient_checkpointing"


class OutOfMemory(RunnerError):
    """Raised when host or GPU memory ran out; `fault` tells which."""

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault


def explain(error: BaseException, where: str) -> RunnerError | None:
    """A clearer error for `error`, raised at stage `where`; None to keep `error`."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    if is_shortage(error):
        return OutOfMemory(f"out of GPU memory while it {where}: {SMALLER} ({text:.300})", Fault.GPU_OOM)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError | OSError) and _HOST.search(text)):
        return OutOfMemory(f"out of host memory while it {where}: {SMALLER} ({text or name:.300})", Fault.HOST_OOM)
    if (tracker := type(error).__module__.partition(".")[0]) in TRACKERS:
        return RunnerError(f"spec.training.report_to: {tracker}: {text or name:.400}")
    return None


def is_echo(error_text: str) -> bool:
    """Whether an error only reports the loss of another rank."""
    return _PEER.search(error_text) is not None
