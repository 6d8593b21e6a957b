"""The report on a task's GPUs after it has ended: back at their baseline, or what holds them."""

from __future__ import annotations

import msgspec

from flowmesh.node.gpu_holders import Holder
from flowmesh.node.release_state import GpuState


class GpuRelease(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU's memory before, during and after a task, for the result's `resources`."""

    state: GpuState
    before_bytes: int
    peak_bytes: int
    after_bytes: int | None
    """None: it does not answer any more."""
    pids_before: tuple[int, ...] = ()
    pids_after: tuple[int, ...] = ()
    holders: tuple[Holder, ...] = ()
    """The processes that keep it from its baseline."""
    why: str = ""
    """The driver's error, where it does not answer."""


class ReleaseReport(msgspec.Struct, frozen=True, kw_only=True):
    """All GPUs of a task. `str()` gives one line for logs and errors."""

    released: bool
    ms: float
    """Milliseconds until the last GPU was back at its baseline, or until the wait was given up."""
    gpus: dict[str, GpuRelease]
    """By UUID."""

    def __str__(self) -> str:
        if self.released:
            return f"{len(self.gpus)} GPUs back at their baseline after {self.ms:.0f} ms"
        return "; ".join(_line(uuid, gpu) for uuid, gpu in self.gpus.items() if gpu.state is not GpuState.RELEASED)


def _line(uuid: str, gpu: GpuRelease) -> str:
    holders = ", ".join(str(holder) for holder in gpu.holders)
    match gpu.state:
        case GpuState.LOST:
            return f"{uuid} does not answer: {gpu.why}"
        case GpuState.HELD:
            return f"{uuid} is still held by the task: {holders}"
        case GpuState.FOREIGN:
            return f"{uuid} is used by somebody else: {holders}"
        case GpuState.LEAKED | GpuState.RELEASED:
            more = ((gpu.after_bytes or 0) - gpu.before_bytes) / (1 << 20)
            return f"{uuid} has {more:.0f} MiB more in use than before the task" + (f": {holders}" if holders else "")
