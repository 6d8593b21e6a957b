"""Power and energy of a node: `power`, `power_summary` and `estimated_energy_kwh` of docs/contract.md.

Joules come from counters where there are any, else from sampled power integrated over time. What is not known is
None, never an estimate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import psutil

from flowmesh.messages.wire import utc_now
from flowmesh.node.devices import GpuInfo, GpuReading, GpuSample
from flowmesh.node.rapl import POWERCAP, Rapl

JOULES_PER_KWH = 3.6e6

MAX_GAP_S = 120.0
"""Two power samples further apart than this are not integrated: the power between them is unknown."""

SHORTEST_S = 1.0
"""Watts are computed from a counter over at least this long: over less, its update steps would show."""


class GpuWatts(msgspec.Struct, frozen=True):
    index: int
    power_w: float | None


class GpusWatts(msgspec.Struct, frozen=True):
    total: float | None
    per_gpu: tuple[GpuWatts, ...]


class Power(msgspec.Struct, frozen=True):
    """`power`: what is drawn now."""

    timestamp: str
    cpu_watts: float | None
    gpu_watts: GpusWatts


class EnergyBreakdown(msgspec.Struct, frozen=True):
    cpu_kwh: float | None
    gpu_kwh: float | None


class SampleCounts(msgspec.Struct, frozen=True):
    cpu: int
    gpu: int


class PowerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """`power_summary`: since the start."""

    uptime_sec: float
    avg_cpu_watts: float | None
    avg_gpu_watts: float | None
    per_gpu_avg_watts: dict[str, float]
    """By index. A GPU without readings is left out."""
    estimated_energy_kwh: float | None
    estimated_energy_breakdown: EnergyBreakdown
    samples: SampleCounts


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """What a node has used so far. A task's use is the difference of two; see `energy.TaskMeter`."""

    at_s: float
    cpu_j: float | None
    cpu_busy_s: float
    """CPU seconds that all processes of the machine have run."""
    board_j: dict[str, float]
    """By board UUID; a board without readings is left out."""


class _Channel:
    """One source of joules: their sum, and the seconds that the sum covers."""

    def __init__(self) -> None:
        self.joules = 0.0
        self.seconds = 0.0
        self.samples = 0
        self.watts: float | None = None
        """Now: the sensor's reading, else the mean of the last SHORTEST_S or more."""
        self._recent_j = 0.0
        self._recent_s = 0.0

    def add(self, joules: float, seconds: float, power_w: float | None = None) -> None:
        self.joules += joules
        self.seconds += seconds
        self.samples += seconds > 0
        self._recent_j += joules
        self._recent_s += seconds
        if power_w is not None:
            self.watts = power_w
        elif self._recent_s >= SHORTEST_S:
            self.watts = self._recent_j / self._recent_s
        if self._recent_s >= SHORTEST_S:
            self._recent_j = self._recent_s = 0.0

    @property
    def mean_w(self) -> float | None:
        return self.joules / self.seconds if self.seconds > 0 else None

    @property
    def known_j(self) -> float | None:
        return self.joules if self.samples else None


class PowerMeter:
    """Adds up the node's joules, one observation at a time. Used from one event loop; reads a few small files."""

    def __init__(
        self,
        sysfs_root: Path = POWERCAP,
        clock: Callable[[], float] = time.monotonic,
        *,
        timestamp: Callable[[], str] = utc_now,
        cpu_busy_s: Callable[[], float] | None = None,
    ) -> None:
        self._clock = clock
        self._timestamp = timestamp
        self._cpu_busy_s = cpu_busy_s or machine_cpu_busy_s
        self._rapl = Rapl(sysfs_root)
        self._started_s = self._cpu_at_s = clock()
        self._cpu = _Channel()
        self._boards: dict[str, _Channel] = {}
        self._board_of: dict[str, str] = {}
        self._last: dict[str, tuple[float, GpuSample]] = {}

    @property
    def cpu_unavailable(self) -> str | None:
        """Why CPU power is unknown, for the log and the doctor; None where it is known."""
        return self._rapl.unavailable

    def observe(self, readings: Mapping[str, GpuReading] | None = None) -> None:
        """Read the CPU's counters, and add what NVML has just returned for some GPUs."""
        now_s = self._clock()
        joules = self._rapl.advance_j()
        if joules is None:
            self._cpu.watts = None
        else:
            self._cpu.add(joules, now_s - self._cpu_at_s)
        self._cpu_at_s = now_s
        seen: set[str] = set()
        for reading in (readings or {}).values():
            if not isinstance(reading, GpuSample):
                if (lost := self._boards.get(self._board_of.get(reading.uuid, ""))) is not None:
                    lost.watts = None
                continue
            self._board_of[reading.uuid] = reading.board
            if reading.board not in seen:
                seen.add(reading.board)
                self._observe_board(reading, now_s)

    def power(self, gpus: Sequence[GpuInfo] = (), cpu_share: float = 1.0) -> Power:
        """What the CPU and these GPUs draw now.

        Args:
            cpu_share: the part of the CPU's power to report, so that the workers of one node do not count it twice.
        """
        boards = _boards(gpus)
        per_gpu = tuple(
            GpuWatts(index, _rounded(self._boards[board].watts if board in self._boards else None))
            for board, index in boards.items()
        )
        known = [gpu.power_w for gpu in per_gpu if gpu.power_w is not None]
        return Power(
            timestamp=self._timestamp(),
            cpu_watts=_rounded(_times(self._cpu.watts, cpu_share)),
            gpu_watts=GpusWatts(total=_rounded(sum(known)) if known else None, per_gpu=per_gpu),
        )

    def summary(self, gpus: Sequence[GpuInfo] = (), cpu_share: float = 1.0) -> PowerSummary:
        """What the CPU (its `cpu_share`) and these GPUs have drawn since the start."""
        boards = {board: index for board, index in _boards(gpus).items() if board in self._boards}
        channels = [self._boards[board] for board in boards]
        means = [mean for channel in channels if (mean := channel.mean_w) is not None]
        gpu_j = [joules for channel in channels if (joules := channel.known_j) is not None]
        cpu_kwh = _kwh(_times(self._cpu.known_j, cpu_share))
        gpu_kwh = _kwh(sum(gpu_j) if gpu_j else None)
        known = [kwh for kwh in (cpu_kwh, gpu_kwh) if kwh is not None]
        return PowerSummary(
            uptime_sec=round(self._clock() - self._started_s, 3),
            avg_cpu_watts=_rounded(_times(self._cpu.mean_w, cpu_share)),
            avg_gpu_watts=_rounded(sum(means)) if means else None,
            per_gpu_avg_watts={
                str(index): round(mean, 3)
                for board, index in boards.items()
                if (mean := self._boards[board].mean_w) is not None
            },
            estimated_energy_kwh=round(sum(known), 9) if known else None,
            estimated_energy_breakdown=EnergyBreakdown(cpu_kwh, gpu_kwh),
            samples=SampleCounts(cpu=self._cpu.samples, gpu=max((channel.samples for channel in channels), default=0)),
        )

    def board_joules(self) -> dict[str, float]:
        """By board UUID, as of the last `observe`; a board without readings is left out."""
        return {board: channel.joules for board, channel in self._boards.items() if channel.samples}

    def totals(self) -> Totals:
        """The sums so far, as of the last `observe`."""
        return Totals(
            at_s=self._cpu_at_s,
            cpu_j=self._cpu.joules if self._rapl.unavailable is None else None,
            cpu_busy_s=self._cpu_busy_s(),
            board_j=self.board_joules(),
        )

    def _observe_board(self, sample: GpuSample, now_s: float) -> None:
        channel = self._boards.setdefault(sample.board, _Channel())
        last = self._last.get(sample.board)
        self._last[sample.board] = (now_s, sample)
        if last is None or now_s <= last[0]:
            channel.watts = sample.power_w
            return
        seconds = now_s - last[0]
        joules = _joules(last[1], sample, seconds)
        if joules is None:
            channel.watts = sample.power_w
        else:
            channel.add(joules, seconds, sample.power_w)


def _joules(before: GpuSample, after: GpuSample, seconds: float) -> float | None:
    """Energy between two samples of one board: the counter's difference, else the trapezoid under its power."""
    if before.energy_mj is not None and after.energy_mj is not None and after.energy_mj >= before.energy_mj:
        return (after.energy_mj - before.energy_mj) / 1000
    # No counter, or a driver reload has reset it.
    if before.power_w is None or after.power_w is None or seconds > MAX_GAP_S:
        return None
    return (before.power_w + after.power_w) / 2 * seconds


def machine_cpu_busy_s() -> float:
    """CPU seconds since boot, without idle and I/O wait."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def _boards(gpus: Sequence[GpuInfo]) -> dict[str, int]:
    """Index by board UUID; the slices of one board share its power, so the board appears once."""
    return {gpu.board: gpu.index for gpu in gpus}


def _times(value: float | None, share: float) -> float | None:
    return None if value is None else value * share


def _kwh(joules: float | None) -> float | None:
    return None if joules is None else round(joules / JOULES_PER_KWH, 9)


def _rounded(watts: float | None) -> float | None:
    return None if watts is None else round(watts, 3)
