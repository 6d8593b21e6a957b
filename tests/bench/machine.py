"""The circumstances of a measurement: date, machine, load and noise, as they stand above each table."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import subprocess
import sys
from dataclasses import dataclass

from tests.bench.measure import timed
from tests.bench.ratios import Ratio, ratio

PAIRS = 20
COMMAND = [sys.executable, "-c", "pass"]


@dataclass(frozen=True)
class Circumstances:
    day: str
    machine: str
    loads: tuple[float, float]
    """The machine's load average before and after."""
    noise: Ratio
    """In elapsed time."""
    cpu_noise: Ratio
    quick: bool = False

    def __str__(self) -> str:
        before, after = self.loads
        text = (
            f"{self.day}, {self.machine}. Load {before:.1f} before, {after:.1f} after. Noise: `python -c pass` beside "
            f"itself, {self.noise.pairs} pairs: {self.noise} in time, {self.cpu_noise} in CPU time."
        )
        return f"{text} With `--quick`: few repetitions." if self.quick else text


class Watched:
    """Reads the load at its start, and the rest when asked."""

    def __init__(self, *, quick: bool) -> None:
        self._quick = quick
        self._before = os.getloadavg()[0]

    def circumstances(self) -> Circumstances:
        loads = self._before, os.getloadavg()[0]
        noise, cpu_noise = _noise()
        return Circumstances(today(), machine(), loads, noise, cpu_noise, self._quick)


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def machine() -> str:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{os.cpu_count()} CPUs, {memory:.0f} GiB, Python {platform.python_version()}"


def _noise() -> tuple[Ratio, Ratio]:
    """The same command in pairs, against itself: in elapsed time and in CPU time."""
    wall: tuple[list[float], list[float]] = [], []
    cpu: tuple[list[float], list[float]] = [], []
    for number in range(2 * PAIRS):
        before = _children_s()
        wall[number % 2].append(timed(lambda: subprocess.run(COMMAND, check=True)))
        cpu[number % 2].append(_children_s() - before)
    return ratio(*wall), ratio(*cpu)


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
