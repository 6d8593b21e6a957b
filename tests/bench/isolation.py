"""Heartbeats under load, and how soon a killed task's slot is free."""

from __future__ import annotations

import os
import signal
import time

from tests.bench.measure import Row, deployment, ms, percentile, pss_bytes, spread
from tests.kit.support import until

SLOTS = 10
_CONFIG = '[task_types.burn]\nrunner = "tests.bench.runners:BurnRunner"\nenvironment = "light"\n'


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    seconds = 6 if quick else 30
    with deployment("--log-level", "WARNING", config=_CONFIG, env={"HEARTBEAT_INTERVAL_SEC": "0.2"}) as (node, peer):
        cores = os.cpu_count() or 1
        task_id = peer.dispatch("w1", {"taskType": "burn", "seconds": seconds, "processes": 2 * cores})
        peer.wait_started(task_id)
        time.sleep(seconds - 1)
        pss = pss_bytes(node.pid)
        peer.wait_end(task_id)
        status = node.ask(op="status")
        late_p99, late_max = status["heartbeat_late_p99_s"], status["heartbeat_late_s"]
        free = [_kill_to_free(node, peer) for _ in range(5 if quick else 20)]
    return [
        Row(
            f"heartbeat lateness while {2 * cores} processes burn {cores} cores for {seconds} s (p99; worst)",
            f"{ms(late_p99)}; {ms(late_max)}",
            aim="p99 under 100 ms",
        ),
        Row("supervisor with that task running, PSS", f"{pss / 1e6:.1f} MB"),
        Row(f"supervisor with {SLOTS} tasks running in as many slots, PSS", f"{_pss_with_tasks() / 1e6:.1f} MB"),
        Row("SIGKILL of a task's process → slot free (p50 / p95 / p99)", spread(free), number=percentile(free, 0.5)),
    ]


def _pss_with_tasks() -> int:
    slots = "\n".join(f'[[slots]]\nname = "s{n}"' for n in range(SLOTS))
    with deployment("--log-level", "WARNING", config=slots, first="w1-s0") as (node, peer):
        for n in range(SLOTS):
            peer.wait_started(peer.dispatch(f"w1-s{n}", {"taskType": "echo", "delaySec": 60}))
        return pss_bytes(node.pid)


def _kill_to_free(node, peer) -> float:  # type: ignore[no-untyped-def]
    task_id = peer.dispatch("w1", {"taskType": "echo", "delaySec": 60})
    peer.wait_started(task_id)
    pid = node.task_pid(task_id)
    began = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    until(lambda: node.ask(op="status")["workers"][0]["task_id"] is None, "slot free")
    seconds = time.perf_counter() - began
    peer.wait_end(task_id)
    return seconds
