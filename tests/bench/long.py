"""Long runs: thousands of echo tasks and hundreds of mixed ones through one node, and what grows meanwhile.

The history and the results are kept short, so that what is kept on purpose is full before the first sample counts.
Before mixed tasks echo tasks fill the supervisor's caches: there is no time for so many mixed ones.
"""

from __future__ import annotations

import collections
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from flowmesh.client import Client
from tests.bench.inference import SPEC as INFERENCE
from tests.bench.measure import Row, deployment
from tests.bench.ratios import Slope, slope
from tests.bench.samples import Sample, growth, sample
from tests.kit.promises import CONFIG, misbehave
from tests.kit.rag_corpus import PASSAGES
from tests.kit.support import Node, Orchestrator, until

KEPT = "[node]\nhistory_max = 300\n[results]\nkeep_bytes = 1000000\n"
OPEN = 4
"""Tasks that wait or run at once."""
WARM = 0.2
"""The share of the run before the first sample that counts: caches and kept results fill up."""
FULL = 12_000
"""Tasks after which all counts where more run: the journal keeps the last 10,000 (tasks.journal), and no more.
SQLite's page cache is full after 1,500, and Python's table of interned strings has grown once within 5,000: 1 to 2 MB
each, which over a few hundred tasks look like a leak."""
SAMPLES = 80
DEADLINE_S = 600.0
"""For an end, or for a start after the imports of a fork server."""
FORKED = {"source": {"identifier": "builtin:tiny-llama"}, "transformers": {"dtype": "float32"}}
SHOWN = {
    "supervisor_memory": "supervisor, memory",
    "others_memory": "other processes, memory",
    "all_memory": "all processes, memory",
    "all_pss": "all processes, PSS with pages of files",
    "supervisor_fds": "supervisor, descriptors",
    "all_fds": "all processes, descriptors",
    "threads": "all processes, threads",
    "processes": "processes",
    "journal": "journal",
    "state_disk": "disk below state_dir",
    "state_inodes": "files below state_dir",
    "results_disk": "disk below results.dir",
    "redis_memory": "Redis, memory",
}
SIZES = (
    "supervisor_memory", "others_memory", "all_memory", "all_pss", "journal", "state_disk", "results_disk",
    "redis_memory",
)  # fmt: skip


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    rows = run(2_000 if quick else 20_000, itertools.repeat("echo"), "echo")
    if importlib.util.find_spec("trl") is None:
        return [*rows, Row("mixed tasks", "not measured: trl is not installed")]
    return rows + run(60 if quick else 300, itertools.cycle(MIXED), "mixed", fill=FULL // 10 if quick else FULL)


def run(count: int, kinds: Iterator[str], what: str, *, fill: int = 0) -> list[Row]:
    """
    Args:
        kinds: of the tasks, in turn; see MIXED.
        fill: so many echo tasks before, which no row counts.
    """
    config = KEPT + CONFIG.replace("[tasks]", '[tasks]\nallow_command = ["*"]')
    ends: collections.Counter[str] = collections.Counter()
    tasks: list[int] = []
    samples: list[Sample] = []
    with (
        deployment("--log-level", "WARNING", config=config) as (node, peer),
        Client(node.server.url) as client,
    ):
        tracked = _Tracked(node, peer, client, ends)
        for _ in range(fill):
            tracked.start("echo")
        tracked.wait(0)
        ends.clear()
        began = time.monotonic()
        step = max(1, count // SAMPLES)
        for number in range(1, count + 1):
            tracked.start(next(kinds))
            if number % step == 0:
                tracked.wait(0)
                time.sleep(0.3)
                tasks.append(number)
                samples.append(sample(node, peer.redis))
                print(f"{what}: {number} of {count}, {samples[-1]}", file=sys.stderr, flush=True)
        took_s = time.monotonic() - began
    outcome = ", ".join(f"{number} {word}" for word, number in ends.most_common())
    after = f", after {fill} echo tasks" if fill else ""
    whole = Row(
        f"{count} {what} tasks, {OPEN} at once{after}", f"{count / took_s:.1f} tasks/s, the samples included", outcome
    )
    first = next(at for at, number in enumerate(tasks) if number >= (FULL if count > FULL else WARM * count))
    return [whole, *_rows(what, tasks[first:], samples[first:])]


def _rows(what: str, tasks: list[int], samples: list[Sample]) -> list[Row]:
    rows = []
    for name in sorted(set.intersection(*(set(each.servers_memory) for each in samples))):
        values = [float(each.servers_memory[name]) for each in samples]
        title = f"{what}: fork server {name} and its children, memory"
        rows.append(_row(title, values, growth(tasks, values), size=True))
    for field, title in SHOWN.items():
        values = [float(getattr(each, field)) for each in samples]
        rows.append(_row(f"{what}: {title}", values, growth(tasks, values), size=field in SIZES))
    steps = tasks[1:]
    costs = [
        (after.cpu_s - before.cpu_s) / (number - earlier)
        for (earlier, before), (number, after) in itertools.pairwise(zip(tasks, samples, strict=True))
    ]
    line = slope(steps, costs)
    rows.append(
        Row(
            f"{what}: CPU time of a task",
            " → ".join(f"{1e3 * (line.start + line.per_step * at):.1f} ms" for at in (steps[0], steps[-1])),
            f"{1e6 * line.per_step:+.3f} ± {1e6 * line.error:.3f} µs a task",
            "flat",
            line.per_step,
        )
    )
    return rows


def _row(title: str, values: list[float], line: Slope, *, size: bool) -> Row:
    shown: Callable[[float], str] = (lambda value: f"{value / 1e6:.2f} MB") if size else (lambda value: f"{value:.0f}")
    unit = " bytes" if size else ""
    verdict = "grows" if line.grows else "flat"
    against = f"{line.per_step:+.3g} ± {line.error:.2g}{unit} a task: {verdict}"
    return Row(
        title, f"{shown(values[0])} → {shown(values[-1])}, most {shown(max(values))}", against, "flat", line.per_step
    )


class _Tracked:
    """Tasks of all kinds, their expected ends, and a bound on how many are open."""

    def __init__(self, node: Node, peer: Orchestrator, client: Client, ends: collections.Counter[str]) -> None:
        self._node = node
        self._peer = peer
        self._client = client
        self._ends = ends
        self._open: dict[str, str] = {}

    def start(self, kind: str) -> None:
        self.wait(OPEN - 1)
        if kind == "queued echo":
            task_id = self._client.queue({"spec": {"taskType": "echo"}}).task_id
        else:
            task_id = self._peer.dispatch("w1", SPECS[kind])
        self._open[task_id] = kind
        if kind == "cancelled":
            self._peer.wait_started(task_id, DEADLINE_S)
            self._node.ask(op="cancel", task_id=task_id)

    def wait(self, most: int) -> None:
        """Until at most so many are open."""
        end = time.monotonic() + DEADLINE_S
        while len(self._open) > most:
            self._peer.hear(1.0)
            for event in self._peer.task_events:
                if event["type"] != "TASK_STARTED" and (kind := self._open.pop(event["task_id"], None)):
                    self._count(kind, event)
            self._peer.task_events.clear()
            self._peer.worker_events.clear()
            self._peer.told.clear()
            self._peer.beats_heard_s.clear()
            if time.monotonic() > end:
                raise RuntimeError(f"no end of {self._open}")
        if most == 0:
            until(lambda: not self._node.ask(op="status")["tasks"], "no task is left")

    def _count(self, kind: str, event: dict[str, Any]) -> None:
        found = "ok" if event["type"] == "TASK_SUCCEEDED" else event["payload"]["error_kind"]
        if found != EXPECTED.get(kind, "ok"):
            raise RuntimeError(f"a task of the kind {kind!r} ended with {found}: {event.get('error')}")
        self._ends[found] += 1


SPECS: dict[str, dict[str, Any]] = {
    "echo": {"taskType": "echo"},
    "fails": misbehave("raise"),
    "killed": misbehave("kill_self"),
    "cancelled": misbehave("sleep", seconds=600),
    "out of time": misbehave("sleep", seconds=600, timeoutSec=1),
    "inference": INFERENCE,
    "command": {"taskType": "command", "command": ["sh", "-c", "echo done > out.txt"], "outputs": ["out.txt"]},
    "rag": {
        "taskType": "rag",
        "data": {"type": "list", "items": ["a slot", "a node"]},
        "faiss": {"documents": {"type": "list", "items": list(PASSAGES.values())}},
        "search": {"top_k": 2},
        "enforce_cpu": True,
        "generate": {"temperature": 0, "max_tokens": 8},
        "model": FORKED,
    },
    "training": {
        "taskType": "sft",
        "model": FORKED,
        "data": {"prompts": [f"{a} plus {b} is {a + b}" for a in range(4) for b in range(4)]},
        "training": {"max_steps": 3, "batch_size": 4, "max_seq_length": 32, "allow_multi_gpu": False},
    },
}
EXPECTED = {"fails": "error", "killed": "crash", "cancelled": "cancelled", "out of time": "timeout"}
MIXED = (
    "echo", "fails", "inference", "queued echo", "cancelled", "command", "rag", "killed", "out of time", "training",
)  # fmt: skip
