"""A tiny Transformers task: on a cold node, forked, and in a fresh interpreter that imports for itself."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.measure import Row, deployment, ms, percentile, publish_to_end, spread, timed

SPEC: dict[str, Any] = {
    "taskType": "inference",
    "engine": "transformers",
    "enforce_cpu": True,
    "model": {
        "source": {"type": "huggingface", "identifier": "builtin:tiny-llama"},
        "transformers": {"dtype": "float32"},
    },
    "data": {"type": "list", "items": ["one", "two words", "three more words"]},
    "inference": {"temperature": 0, "max_tokens": 8},
}

_SPAWNED = """
import sys, json
from flowmesh.messages.job import Job
from runners.api import Context
from runners.inference.runner import InferenceRunner
out, spec = sys.argv[1], json.loads(sys.argv[2])
job = Job(attempt=1, task_id="t", task_type="inference", runner="", task={"spec": spec}, out_dir=out, results_dir=out,
          cache_dir=out, tmp_dir=out, threads=2)
assert InferenceRunner().run(Context(job))["ok"]
import os
os._exit(0)
"""


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    if importlib.util.find_spec("transformers") is None:
        return [Row("a tiny Transformers task", "not measured: transformers is not installed")]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "artifacts").mkdir()
        command = [sys.executable, "-c", _SPAWNED, folder, json.dumps(SPEC)]
        spawned = [timed(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(3)]
    with deployment("--log-level", "WARNING") as (_, peer):
        cold = publish_to_end(peer, SPEC)
        forked = [publish_to_end(peer, SPEC) for _ in range(5 if quick else 20)]
    floor = percentile(spawned, 0.5)
    p50 = percentile(forked, 0.5)
    return [
        Row("tiny Transformers task in a fresh interpreter (p50)", ms(floor), number=floor),
        Row("the same through a node whose fork server has to start first", ms(cold)),
        Row(
            "the same, forked: publish → TASK_SUCCEEDED (p50 / p95 / p99)",
            spread(forked),
            f"{floor / p50:.0f} times faster than a fresh interpreter",
            "under 200 ms",
            p50,
        ),
    ]
