"""The gap between two tasks of a slot, with the model of the next one read while the one before runs, and without."""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.inference import SPEC
from tests.bench.measure import Row, deployment, ms
from tests.bench.ratios import ratio
from tests.kit.support import Node, Orchestrator

BUSY_S = 6.0
_CONFIG = """
[tasks]
prepare_next = {on}
[environments.default]
warm = "on first use"
[task_types.count]
runner = "tests.bench.runners:CountRunner"
environment = "light"
"""


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    if importlib.util.find_spec("transformers") is None:
        return [Row("the gap between two tasks", "not measured: transformers is not installed")]
    pairs = 3 if quick else 8
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        model, size = _large_model(Path(folder))
        spec = {**SPEC, "model": {**SPEC["model"], "source": {"type": "huggingface", "identifier": str(model)}}}
        with (
            deployment("--log-level", "WARNING", config=_CONFIG.format(on="true")) as with_,
            deployment("--log-level", "WARNING", config=_CONFIG.format(on="false")) as without,
        ):
            for node, peer in (with_, without):
                _once(node, peer, spec, model)  # imports
            found = [(_once(*with_, spec, model), _once(*without, spec, model)) for _ in range(pairs)]
    prepared, not_prepared = [with_ for with_, _ in found], [without for _, without in found]
    gaps = [gap for gap, _ in prepared], [gap for gap, _ in not_prepared]
    return [
        Row(
            f"a Transformers task whose {size >> 20} MiB of weights are not in the kernel's cache, prepared while "
            "another one ran: end of that one → its end (p50)",
            ms(statistics.median(gaps[0])),
            f"{ratio(*gaps)} × without that ({ms(statistics.median(gaps[1]))})",
        ),
        Row(
            f"work of the task before, which keeps all CPUs busy for {BUSY_S:.0f} s, without that / with it",
            str(ratio([count for _, count in not_prepared], [count for _, count in prepared])),
            aim="at most 1.02",
        ),
    ]


def _once(node: Node, peer: Orchestrator, spec: dict[str, Any], model: Path) -> tuple[float, float]:
    """Seconds from the end of a busy task to that of the next one, and how far the busy one counted."""
    for file in model.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    first = peer.dispatch("w1", {"taskType": "count", "seconds": BUSY_S, "processes": os.cpu_count() or 1})
    peer.wait_started(first)
    second = peer.dispatch("w1", spec)
    peer.wait_end(first)
    began = time.perf_counter()
    end = peer.wait_end(second, 300)
    seconds = time.perf_counter() - began
    if end["type"] != "TASK_SUCCEEDED":
        raise RuntimeError(end["error"])
    return seconds, node.result(first)["count"]


def _large_model(folder: Path) -> tuple[Path, int]:
    """A random Llama, and the size of its weights in bytes."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from runners.models.builtin import write_tiny_llama

    target = folder / "model"
    target.mkdir()
    write_tiny_llama(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    (target / "model.safetensors").unlink()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(target)
    return target, (target / "model.safetensors").stat().st_size
