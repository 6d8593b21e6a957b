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

from tests.bench.floor import QUEUE
from tests.bench.measure import Row, deployment, ms, number_of, percentile, publish_to_end, spread, times

MEMORY = "/dev/shm"


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    count = 50 if quick else 200
    fork, start, queue = (number_of(so_far, name) for name in ("a bare fork", "`python -c pass`", QUEUE))
    one_by_one, at_once = _echoes(count)
    p50 = percentile(one_by_one, 0.5)
    rows = [
        Row(
            f"echo, {count} one after another: publish → TASK_SUCCEEDED (p50 / p95 / p99)",
            spread(one_by_one),
            " and ".join(filter(None, (times(p50, fork, "a bare fork"), times(p50, queue, "RQ")))),
            "p50 under 8 ms where RQ takes 9.4: 0.85 ×",
            p50,
        ),
        Row(
            f"echo, {count} at once",
            f"{count / at_once:.0f} tasks/s",
            times(at_once / count, start, "`python -c pass`"),
        ),
        Row("echo, per task when at once", ms(at_once / count), times(at_once / count, fork, "a bare fork")),
    ]
    if os.access(MEMORY, os.W_OK):
        with _folders_in(MEMORY):
            one_by_one, at_once = _echoes(count)
        p50 = percentile(one_by_one, 0.5)
        rows += [
            Row(
                "the same with the node's folders in memory: one after another (p50 / p95 / p99)",
                spread(one_by_one),
                times(p50, queue, "RQ"),
                "",
                p50,
            ),
            Row("the same with the node's folders in memory: at once", f"{count / at_once:.0f} tasks/s"),
        ]
    return rows


def _echoes(count: int) -> tuple[list[float], float]:
    """Seconds of each, and of as many at once."""
    with deployment("--log-level", "WARNING") as (_, peer):
        for _ in range(5):
            publish_to_end(peer, {"taskType": "echo"})
        one_by_one = [publish_to_end(peer, {"taskType": "echo"}) for _ in range(count)]
        began = time.perf_counter()
        ids = {peer.dispatch("w1", {"taskType": "echo"}) for _ in range(count)}
        while ids:
            peer.hear(1.0)
            ids -= {e["task_id"] for e in peer.task_events if e["type"] == "TASK_SUCCEEDED"}
            peer.task_events.clear()
        return one_by_one, time.perf_counter() - began


@contextlib.contextmanager
def _folders_in(place: str) -> Iterator[None]:
    before, tempfile.tempdir = tempfile.tempdir, place
    try:
        yield
    finally:
        tempfile.tempdir = before
