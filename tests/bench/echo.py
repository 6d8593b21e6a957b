"""Publish → TASK_SUCCEEDED for echo, one after another and all at once; on this machine's disk, and in its memory.

A task makes some ten small files and folders. What that takes is the file system's: ext4 looks long for a free inode
where many were freed in the last half minute, as after many short tasks, or after a test run.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator

from tests.bench import queue
from tests.bench.measure import Row, deployment, ms, number_of, percentile, publish_to_end, spread, timed, times

MEMORY = "/dev/shm"


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    count = 50 if quick else 200
    fork, start = number_of(so_far, "a bare fork"), number_of(so_far, "`python -c pass`")
    one_by_one, queued, at_once = _echoes(count)
    p50 = percentile(one_by_one, 0.5)
    rows = [
        Row(
            f"echo, {count} one after another: publish → TASK_SUCCEEDED (p50 / p95 / p99)",
            spread(one_by_one),
            times(p50, fork, "a bare fork"),
            "p50 under 8 ms",
            p50,
        ),
        _beside("RQ, which forks for each job, in turn with them: enqueue → result", p50, queued),
        Row(
            f"echo, {count} at once",
            f"{count / at_once:.0f} tasks/s",
            times(at_once / count, start, "`python -c pass`"),
        ),
        Row("echo, per task when at once", ms(at_once / count), times(at_once / count, fork, "a bare fork")),
    ]
    if os.access(MEMORY, os.W_OK):
        with _folders_in(MEMORY):
            one_by_one, queued, at_once = _echoes(count)
        p50 = percentile(one_by_one, 0.5)
        where = "with the node's folders in memory"
        rows += [
            Row(f"{where}: one after another (p50 / p95 / p99)", spread(one_by_one), "", "", p50),
            _beside(f"{where}: RQ in turn with them", p50, queued),
            Row(f"{where}: at once", f"{count / at_once:.0f} tasks/s"),
        ]
    return rows


def _beside(what: str, p50: float, queued: list[float]) -> Row:
    if not queued:
        return Row(what, "not measured: rq is not installed")
    return Row(what, spread(queued), f"echo takes {p50 / percentile(queued, 0.5):.2f} × that")


def _echoes(count: int) -> tuple[list[float], list[float], float]:
    """Seconds of each; of each of a job queue's jobs, in turn with them; and of as many echoes at once."""
    with deployment("--log-level", "WARNING") as (_, peer):
        one_by_one, queued = [], []
        with queue.running() as job:
            for index in range(count + 5):
                seconds = publish_to_end(peer, {"taskType": "echo"})
                if index >= 5:
                    one_by_one.append(seconds)
                if job is not None:
                    queued.append(timed(job))
        began = time.perf_counter()
        ids = {peer.dispatch("w1", {"taskType": "echo"}) for _ in range(count)}
        while ids:
            peer.hear(1.0)
            ids -= {e["task_id"] for e in peer.task_events if e["type"] == "TASK_SUCCEEDED"}
            peer.task_events.clear()
        return one_by_one, queued, time.perf_counter() - began


@contextlib.contextmanager
def _folders_in(place: str) -> Iterator[None]:
    before, tempfile.tempdir = tempfile.tempdir, place
    try:
        yield
    finally:
        tempfile.tempdir = before
