"""The first task of a node that has had time to warm its environments, beside those that follow it.

Its model lies on disk before the node starts: a `builtin:` one would be made by the first task.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.inference import SPEC
from tests.bench.measure import Row, deployment, ms, publish_to_end
from tests.bench.vllm import TINY, in_venv_vllm
from tests.kit.support import Node, until

AFTER_S = 30.0
"""When the first task comes, after the start of the node."""
LATER = 4
WARM = "--set=processes.warm_max_mb=16384"
"""Room for all environments, as the default has on a node of 64 GiB. Nodes of the tests warm nothing otherwise."""
DEADLINE_S = 300.0


@dataclass(frozen=True)
class Times:
    """Of one fresh node, in seconds."""

    idle: float
    warm: float
    """From the start of its process to an environment that is imported."""
    first: float
    later: list[float]


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    rows = []
    if importlib.util.find_spec("transformers") is None:
        rows.append(Row("the first tiny Transformers task", "not measured: transformers is not installed"))
    else:
        rows += _rows("Transformers", SPEC, "at most 250 ms", quick=quick)
    return rows + in_venv_vllm("tests.bench.first", quick=quick, run=_vllm)


def _vllm(*, quick: bool) -> list[Row]:
    return _rows("vLLM", TINY, "at most 2.5 s", quick=quick)


def _rows(what: str, spec: dict[str, Any], aim: str, *, quick: bool) -> list[Row]:
    from runners.models.builtin import write_tiny_llama

    with tempfile.TemporaryDirectory() as folder:
        write_tiny_llama(Path(folder))
        source = {"type": "huggingface", "identifier": folder}
        spec = {**spec, "model": {**spec["model"], "source": source}}
        nodes = [_fresh(spec) for _ in range(2 if quick else 5)]
    first = statistics.median(each.first for each in nodes)
    later = statistics.median(seconds for each in nodes for seconds in each.later)
    all_first = ", ".join(ms(each.first) for each in nodes)
    return [
        Row(
            f"start of a node → its environment with {what} is imported, median of {len(nodes)} nodes",
            ms(statistics.median(each.warm for each in nodes)),
            f"IDLE after {ms(statistics.median(each.idle for each in nodes))}",
        ),
        Row(
            f"the first tiny {what} task of a node, {AFTER_S:.0f} s after its start: publish → TASK_SUCCEEDED",
            f"{ms(first)} (nodes: {all_first})",
            f"{first / later:.2f} × the second to the {LATER + 1}th (median {ms(later)})",
            aim,
            first,
        ),
    ]


def _fresh(spec: dict[str, Any]) -> Times:
    began = time.monotonic()
    with deployment("--log-level", "WARNING", WARM) as (node, peer):
        idle = time.monotonic() - began
        until(lambda: _is_warm(node), "its environment is imported", DEADLINE_S)
        warm = time.monotonic() - began
        time.sleep(max(0.0, began + AFTER_S - time.monotonic()))
        first = publish_to_end(peer, spec)
        return Times(idle, warm, first, [publish_to_end(peer, spec) for _ in range(LATER)])


def _is_warm(node: Node) -> bool:
    servers = node.ask(op="status")["servers"]
    return any(each["environment"] == "default" and each["state"] == "ready" for each in servers)


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(row) for row in _vllm(quick="--quick" in sys.argv)]))
