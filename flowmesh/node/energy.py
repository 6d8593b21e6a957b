"""What one task used: energy of its GPUs, its share of the CPU's, cost, and utilization of its GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from flowmesh.node.devices import GpuInfo, GpuReading, GpuSample
from flowmesh.node.power import JOULES_PER_KWH, Totals
from flowmesh.node.release_report import ReleaseReport

SECONDS_PER_HOUR = 3600.0


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """`energy` of a terminal event. None: unknown."""

    gpu_joules: float | None
    cpu_joules: float | None
    """The CPU's energy times the task's share of all CPU seconds that the machine ran during the task."""
    kwh: float | None
    """The sum of those that are known."""


class GpuUse(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU during a task."""

    index: int
    utilization_mean_percent: float | None
    utilization_peak_percent: int | None
    memory_mean_bytes: int | None
    memory_before_bytes: int | None = None
    memory_peak_bytes: int | None = None
    memory_after_bytes: int | None = None
    processes_before: tuple[int, ...] = ()
    processes_after: tuple[int, ...] = ()
    """Pids just before the task, and when its release was proven or given up."""
    temperature_peak_c: int | None = None
    throttled: tuple[str, ...] = ()
    """Every reason that was sampled."""


class ProcessUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel counted for the task's process tree. None: unknown."""

    cpu_seconds: float | None = None
    peak_rss_bytes: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None


NOTHING_COUNTED = ProcessUse()


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """`resources` of a terminal event and of a result."""

    cpu_seconds: float | None
    peak_rss_bytes: int | None
    read_bytes: int | None
    written_bytes: int | None
    gpus: dict[str, GpuUse]
    """By UUID."""
    gpu_release_ms: float | None = None
    """Milliseconds from the end of the task's last process until its GPUs were back at their baseline."""
    gpu_held: str | None = None
    """What held them, where they were not back in time."""


class TaskUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Three fields of a terminal event's payload. `cost_usd` is the slot's price for the runtime."""

    energy: Energy
    cost_usd: float
    resources: Resources


class _GpuSamples:
    """Running sums over the samples of one GPU."""

    def __init__(self) -> None:
        self.utilizations: list[int] = []
        self.memory_sum_bytes = 0
        self.memory_peak_bytes = 0
        self.count = 0
        self.temperature_peak_c: int | None = None
        self.throttled: set[str] = set()

    def add(self, sample: GpuSample) -> None:
        self.count += 1
        self.memory_sum_bytes += sample.used_bytes
        self.memory_peak_bytes = max(self.memory_peak_bytes, sample.used_bytes)
        self.throttled.update(sample.throttled)
        if sample.utilization_percent is not None:
            self.utilizations.append(sample.utilization_percent)
        if sample.temperature_c is not None:
            self.temperature_peak_c = max(self.temperature_peak_c or 0, sample.temperature_c)


class TaskMeter:
    """One task's use of its GPUs and CPUs.

    Args:
        start: the node's totals just before the task.
    """

    def __init__(self, gpus: Sequence[GpuInfo], start: Totals) -> None:
        self._gpus = tuple(gpus)
        self._start = start
        self._samples = {gpu.uuid: _GpuSamples() for gpu in gpus}

    def observe(self, readings: Mapping[str, GpuReading]) -> None:
        """Add one sample of each GPU. Readings of other GPUs are ignored."""
        for uuid in self._samples.keys() & readings.keys():
            reading = readings[uuid]
            if isinstance(reading, GpuSample):
                self._samples[uuid].add(reading)

    def finish(
        self,
        end: Totals,
        *,
        runtime_s: float,
        cost_per_hour: float,
        processes: ProcessUse = NOTHING_COUNTED,
        release: ReleaseReport | None = None,
    ) -> TaskUsage:
        """The task's usage, once its slot is free.

        Args:
            end: the node's totals now.
            runtime_s: how long the task had its slot.
            cost_per_hour: the slot's price in USD.
        """
        gpu_j = self.gpu_joules_so_far(end.board_j)
        cpu_j = self._cpu_joules(end, processes.cpu_seconds)
        known = [joules for joules in (gpu_j, cpu_j) if joules is not None]
        return TaskUsage(
            energy=Energy(
                gpu_joules=None if gpu_j is None else round(gpu_j, 3),
                cpu_joules=None if cpu_j is None else round(cpu_j, 3),
                kwh=round(sum(known) / JOULES_PER_KWH, 9) if known else None,
            ),
            cost_usd=round(cost_per_hour * runtime_s / SECONDS_PER_HOUR, 9),
            resources=Resources(
                cpu_seconds=processes.cpu_seconds,
                peak_rss_bytes=processes.peak_rss_bytes,
                read_bytes=processes.read_bytes,
                written_bytes=processes.written_bytes,
                gpus={gpu.uuid: self._use(gpu, release) for gpu in self._gpus},
                gpu_release_ms=release.ms if release is not None and release.released else None,
                gpu_held=str(release) if release is not None and not release.released else None,
            ),
        )

    def gpu_joules_so_far(self, board_j: Mapping[str, float]) -> float | None:
        """None without GPUs, for slices of a shared board, and where a board's energy is unknown.

        Args:
            board_j: the node's joules by board, now.
        """
        if not self._gpus or any(gpu.mig is not None for gpu in self._gpus):
            return None
        if not all(gpu.board in board_j for gpu in self._gpus):
            return None
        return sum(board_j[gpu.board] - self._start.board_j.get(gpu.board, 0.0) for gpu in self._gpus)

    def _cpu_joules(self, end: Totals, cpu_seconds: float | None) -> float | None:
        if end.cpu_j is None or self._start.cpu_j is None or cpu_seconds is None:
            return None
        busy_s = end.cpu_busy_s - self._start.cpu_busy_s
        share = min(cpu_seconds / busy_s, 1.0) if busy_s > 0 else 0.0
        return (end.cpu_j - self._start.cpu_j) * share

    def _use(self, gpu: GpuInfo, release: ReleaseReport | None) -> GpuUse:
        seen = self._samples[gpu.uuid]
        proof = release.gpus.get(gpu.uuid) if release is not None else None
        peaks = [seen.memory_peak_bytes] if seen.count else []
        peaks += [proof.peak_bytes] if proof is not None else []
        return GpuUse(
            index=gpu.index,
            utilization_mean_percent=(
                round(sum(seen.utilizations) / len(seen.utilizations), 1) if seen.utilizations else None
            ),
            utilization_peak_percent=max(seen.utilizations, default=None),
            memory_mean_bytes=seen.memory_sum_bytes // seen.count if seen.count else None,
            memory_before_bytes=None if proof is None else proof.before_bytes,
            memory_peak_bytes=max(peaks, default=None),
            memory_after_bytes=None if proof is None else proof.after_bytes,
            processes_before=() if proof is None else proof.pids_before,
            processes_after=() if proof is None else proof.pids_after,
            temperature_peak_c=seen.temperature_peak_c,
            throttled=tuple(sorted(seen.throttled)),
        )
