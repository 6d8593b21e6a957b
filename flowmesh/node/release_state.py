"""Whether one GPU is back at its baseline after a task, decided from one reading. Pure."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence

import msgspec

from flowmesh.node.devices import GpuLost, GpuProcess, GpuReading, GpuSample

TOLERANCE_BYTES = 64 << 20
"""A driver keeps some pages after a context has gone; a leaked context is several times this."""


class GpuState(enum.StrEnum):
    """The state of a GPU after a task."""

    RELEASED = "released"
    HELD = "held"
    """A process of the task is on it."""
    FOREIGN = "foreign"
    """A foreign process started to use it."""
    LEAKED = "leaked"
    """More bytes than at the baseline, and no process that accounts for them."""
    LOST = "lost"
    """It does not answer."""


class Baseline(msgspec.Struct, frozen=True):
    """One GPU before a task."""

    uuid: str
    used_bytes: int
    processes: tuple[GpuProcess, ...] = ()
    graphics_bytes: int = 0

    @classmethod
    def of(cls, sample: GpuSample) -> Baseline:
        return cls(sample.uuid, sample.used_bytes, sample.processes or (), sample.graphics_bytes)

    @property
    def pids(self) -> frozenset[int]:
        return frozenset(process.pid for process in self.processes)


def judge(
    baseline: Baseline,
    reading: GpuReading,
    own_pids: Collection[int],
    *,
    tolerance_bytes: int = TOLERANCE_BYTES,
    allow_foreign: bool = False,
) -> GpuState:
    """Whether a GPU is back at its baseline.

    Args:
        own_pids: every process that the task ever had, dead or alive.
        allow_foreign: foreign processes may use this GPU: their bytes are subtracted first.
    """
    if isinstance(reading, GpuLost):
        return GpuState.LOST
    if any(process.pid in own_pids for process in (*(reading.processes or ()), *reading.graphics)):
        return GpuState.HELD
    newcomers = [process for process in reading.processes or () if process.pid not in baseline.pids]
    if newcomers and not allow_foreign:
        return GpuState.FOREIGN
    if allow_foreign and is_shared_blindly(reading):
        return GpuState.RELEASED
    return GpuState.LEAKED if _excess_bytes(baseline, reading, newcomers) > tolerance_bytes else GpuState.RELEASED


def is_shared_blindly(sample: GpuSample) -> bool:
    """Whether a process is on the GPU whose bytes the driver does not report: then the sum proves nothing."""
    return any(process.used_bytes is None for process in sample.processes or ())


def _excess_bytes(baseline: Baseline, sample: GpuSample, newcomers: Sequence[GpuProcess]) -> int:
    """Bytes above what the processes of the baseline and the newcomers account for.

    A process of the baseline may have ended, grown or shrunk since: that is not the task's doing.
    """
    before = {process.pid: process.used_bytes or 0 for process in baseline.processes}
    stayed = {process.pid: process.used_bytes or 0 for process in sample.processes or () if process.pid in before}
    moved = sum(stayed.values()) - sum(before.values()) if sample.processes is not None else 0
    moved += sample.graphics_bytes - baseline.graphics_bytes
    return sample.used_bytes - baseline.used_bytes - moved - sum(process.used_bytes or 0 for process in newcomers)
