"""What the measurements share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kit.support import Node, Orchestrator, RedisServer, until

ECHO = {"spec": {"taskType": "echo"}}


@dataclass(frozen=True)
class Row:
    what: str
    value: str
    against: str = ""
    aim: str = ""
    number: float = 0.0
    """The plain number, for later rows to compare with."""


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def spread(values: list[float]) -> str:
    return " / ".join(ms(percentile(values, share)) for share in (0.5, 0.95, 0.99))


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def number_of(rows: list[Row], start: str) -> float | None:
    return next((row.number for row in rows if row.what.startswith(start)), None)


def times(value: float, floor: float | None, name: str) -> str:
    return "" if not floor else f"{value / floor:.1f} × {name} ({ms(floor)})"


def pss_bytes(pid: int) -> int:
    """A process's part of the memory that it uses, pages of files included."""
    return _rollup(pid)["Pss:"]


def own_bytes(pid: int) -> int:
    """The same without pages of files: of its heap, its stacks and what it shares with its forks."""
    found = _rollup(pid)
    return found["Pss_Anon:"] + found["Pss_Shmem:"]


def _rollup(pid: int) -> dict[str, int]:
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
    return {name: int(kib) * 1024 for name, kib, *_ in lines}


def cpu_s(pid: int) -> float:
    import os

    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def deployment(*args: str, first: str = "", **options: Any) -> Iterator[tuple[Node, Orchestrator]]:
    """A node, its Redis and a peer, all real. The node is executed: a fork would share memory with its parent.

    Args:
        first: the id of a worker of a node that has several; one with a single slot has one id.
    """
    server = RedisServer()
    peer = Orchestrator(server)
    node = Node(server, *args, executed=True, **options)
    try:
        node.start(wait=not first)
        until(lambda: not first or server.client().hget(f"worker:{first}", "status") == b"IDLE", "the node is idle")
        yield node, peer
    finally:
        node.close()
        peer.close()
        server.close()


def publish_to_end(peer: Orchestrator, spec: dict[str, Any]) -> float:
    """Seconds from the publish to the arrival of TASK_SUCCEEDED."""
    began = time.perf_counter()
    task_id = peer.dispatch("w1", spec)
    while True:
        peer.hear(1.0)
        if ends := [e for e in peer.task_events if e["task_id"] == task_id and e["type"] != "TASK_STARTED"]:
            seconds = time.perf_counter() - began
            if ends[0]["type"] != "TASK_SUCCEEDED":
                raise RuntimeError(ends[0]["error"])
            peer.task_events.clear()
            return seconds
