"""What the row log costs: its share of a run's CPU time, for inference and rag."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.measure import Row

PROMPTS, TOKENS = 64, 16


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    return [
        _measured(f"{PROMPTS} prompts × {TOKENS} tokens of a tiny model", "transformers", _inference, quick=quick),
        _measured(f"{PROMPTS} queries of rag × {TOKENS} tokens of a tiny model", "faiss", _rag, quick=quick),
    ]


def _measured(what: str, needs: str, run: Callable[[], tuple[type, dict[str, Any]]], *, quick: bool) -> Row:
    name = f"row log, {what}: its share of the run's CPU time"
    if importlib.util.find_spec(needs) is None:
        return Row(name, f"not measured: {needs} is not installed")
    shares = [_share(*run()) for _ in range(3 if quick else 9)][1:]  # the first one imports
    share = statistics.median(shares)
    return Row(name, f"{share:.3%} ({min(shares):.3%} to {max(shares):.3%})", "the whole run", "at most 1 %", share)


def _inference() -> tuple[type, dict[str, Any]]:
    from runners.inference.runner import InferenceRunner
    from tests.kit.inference_specs import mixed_prompts, spec_of

    spec = spec_of("builtin:tiny-llama", mixed_prompts(PROMPTS, 8), max_tokens=TOKENS, ignore_eos=True)
    return InferenceRunner, spec


def _rag() -> tuple[type, dict[str, Any]]:
    from runners.rag.runner import RagRunner
    from tests.kit.inference_specs import mixed_prompts
    from tests.kit.rag_corpus import PASSAGES

    spec = {
        "data": {"type": "list", "items": mixed_prompts(PROMPTS, 8)},
        "faiss": {"documents": {"type": "list", "items": list(PASSAGES.values())}},
        "search": {"top_k": 2},
        "model": {"source": {"identifier": "builtin:tiny-llama"}, "transformers": {"dtype": "float32"}},
        "enforce_cpu": True,
        "generate": {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True},
    }
    return RagRunner, spec


def _share(kind: type, spec: dict[str, Any]) -> float:
    """CPU time inside the row log, divided by that of the run; a difference of two runs would be noise."""
    from flowmesh.messages.job import Job
    from runners.api import Context
    from runners.rows import opening
    from runners.rows.log import RowLog

    spent = 0.0

    class Timed(RowLog):
        def __init__(self, *args: object, **options: object) -> None:
            nonlocal spent
            began = time.thread_time()
            super().__init__(*args, **options)
            spent += time.thread_time() - began

        def take(self, *args: object) -> None:
            nonlocal spent
            began = time.thread_time()
            super().take(*args)
            spent += time.thread_time() - began

        def add(self, *args: object, **options: object):
            nonlocal spent
            began = time.thread_time()
            try:
                return super().add(*args, **options)
            finally:
                spent += time.thread_time() - began

    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            attempt=1, task_id="t", task_type="inference", runner="", task={"spec": spec}, out_dir=folder + "/out",
            results_dir=folder, cache_dir=folder, tmp_dir=folder, threads=1,
        )  # fmt: skip
        Path(folder, "out", "artifacts").mkdir(parents=True)
        whole, opening.RowLog = opening.RowLog, Timed
        try:
            began = time.process_time()
            assert kind().run(Context(job))["ok"]
            return spent / (time.process_time() - began)
        finally:
            opening.RowLog = whole
