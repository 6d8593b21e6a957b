"""Publish → TASK_SUCCEEDED for echo, one after another and all at once."""

from __future__ import annotations

import time

from tests.bench.measure import Row, deployment, ms, number_of, percentile, publish_to_end, spread, times


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    count = 50 if quick else 200
    fork, start = number_of(so_far, "a bare fork"), number_of(so_far, "`python -c pass`")
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
        at_once = time.perf_counter() - began
    p50 = percentile(one_by_one, 0.5)
    return [
        Row(
            f"echo, {count} one after another: publish → TASK_SUCCEEDED (p50 / p95 / p99)",
            spread(one_by_one),
            times(p50, fork, "a bare fork"),
            "p50 under 8 ms",
            p50,
        ),
        Row(
            f"echo, {count} at once",
            f"{count / at_once:.0f} tasks/s",
            times(at_once / count, start, "`python -c pass`"),
        ),
        Row("echo, per task when at once", ms(at_once / count), times(at_once / count, fork, "a bare fork")),
    ]
