"""The floors: what the machine itself takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.bench.measure import Row, ms, percentile, spread, timed
from tests.support import RedisServer, end_process

QUEUE = "RQ, a job queue that forks for each job"

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
    rows = [
        Row("a bare fork of a plain Python, reaped (p50 / p95 / p99)", spread(forks), number=percentile(forks, 0.5)),
        Row("`python -c pass` (p50)", ms(percentile(starts, 0.5)), number=percentile(starts, 0.5)),
    ]
    queue = _queue(count)
    return [*rows, Row(f"{QUEUE}: enqueue → result, {count} one after another (p50 / p95 / p99)", *queue)]


def _queue(count: int) -> tuple[str, str, str, float]:
    """What another system takes that has each job in a forked process of its own, and nothing of a node besides.

    Returns:
        The fields of its row after the first.
    """
    try:
        import rq
    except ImportError:
        return "not measured: rq is not installed", "", "", 0.0
    server = RedisServer()
    command = [str(Path(sys.executable).with_name("rq")), "worker", "--quiet", "--url", f"unix://{server.path}"]
    worker = subprocess.Popen(command, cwd=server.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        jobs = rq.Queue(connection=server.client())

        def one() -> None:
            result = jobs.enqueue("operator.neg", 1).latest_result(timeout=30)
            if result is None or result.return_value != -1:
                raise RuntimeError("RQ's worker does not answer")

        for _ in range(5):
            one()
        seconds = [timed(one) for _ in range(count)]
    finally:
        end_process(worker)
        server.close()
    return spread(seconds), "", "", percentile(seconds, 0.5)
