"""The floors: what the machine itself takes."""

from __future__ import annotations

import subprocess
import sys

from tests.bench.measure import Row, ms, percentile, spread, timed

_FORKS = """
import os, sys, time
times = []
for _ in range(int(sys.argv[1])):
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    times.append(time.perf_counter() - began)
print(*times)
"""


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    count = 50 if quick else 200
    done = subprocess.run([sys.executable, "-c", _FORKS, str(count)], capture_output=True, text=True, check=True)
    forks = [float(word) for word in done.stdout.split()]
    starts = [timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)) for _ in range(count // 5)]
    return [
        Row("a bare fork of a plain Python, reaped (p50 / p95 / p99)", spread(forks), number=percentile(forks, 0.5)),
        Row("`python -c pass` (p50)", ms(percentile(starts, 0.5)), number=percentile(starts, 0.5)),
    ]
