"""What a fork server's scout does: in small, what the tasks of its environment do."""

from __future__ import annotations

import sys
from pathlib import Path

from flowmesh.messages.job import Job
from runners import child
from runners.api import Context

SPEC = {
    "taskType": "inference",
    "enforce_cpu": True,
    "model": {"source": {"type": "huggingface", "identifier": "builtin:tiny-llama"}, "transformers": {}},
    "data": {"type": "list", "items": ["one"]},
    "inference": {"temperature": 0.0, "max_tokens": 2},
}
"""A document that needs no model hub and no GPU."""


def work(folder: Path) -> None:
    """Run an echo; and a tiny model, where the server has imported what that takes.

    Raises:
        Exception: whatever the runner has.
    """
    child.rehearse()
    if "runners.inference.loader" in sys.modules:
        _infer(folder)


def _infer(folder: Path) -> None:
    from runners.inference.runner import InferenceRunner

    here = str(folder)
    job = Job(
        attempt=0, task_id="", task_type="scout", runner="", task={"spec": SPEC},
        out_dir=here, results_dir=here, cache_dir=here, tmp_dir=here,
    )  # fmt: skip
    InferenceRunner().run(Context(job))
