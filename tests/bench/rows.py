"""What the row log costs: CPU time of an inference run with and without it."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

from tests.bench.measure import Row

PROMPTS, TOKENS = 64, 16


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    name = f"row log, {PROMPTS} prompts × {TOKENS} tokens of a tiny model: its share of the run's CPU time"
    if importlib.util.find_spec("transformers") is None:
        return [Row(name, "not measured: transformers is not installed")]
    shares = [_share() for _ in range(3 if quick else 9)][1:]  # the first one imports
    share = statistics.median(shares)
    return [Row(name, f"{share:.3%} ({min(shares):.3%} to {max(shares):.3%})", "the whole run", "at most 1 %", share)]


def _share() -> float:
    """CPU time inside the row log, divided by that of the run; a difference of two runs would be noise."""
    from flowmesh.messages.job import Job
    from runners.api import Context
    from runners.inference import runner
    from runners.rows.log import RowLog
    from tests.kit.inference_specs import mixed_prompts, spec_of

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

    spec = spec_of("builtin:tiny-llama", mixed_prompts(PROMPTS, 8), max_tokens=TOKENS, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            attempt=1, task_id="t", task_type="inference", runner="", task={"spec": spec}, out_dir=folder + "/out",
            results_dir=folder, cache_dir=folder, tmp_dir=folder, threads=1,
        )  # fmt: skip
        Path(folder, "out", "artifacts").mkdir(parents=True)
        whole, runner.RowLog = runner.RowLog, Timed
        try:
            began = time.process_time()
            assert runner.InferenceRunner().run(Context(job))["ok"]
            return spent / (time.process_time() - began)
        finally:
            runner.RowLog = whole
