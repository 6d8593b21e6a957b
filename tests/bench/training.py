"""SFT through a node against the bare TRL script with the same arguments, taken in turn."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.measure import Row, deployment
from tests.kit.support import Node, Orchestrator

ROWS = [f"row {n} of the training data says that {n} plus {n} is {2 * n}" for n in range(64)]
BATCH, LENGTH, RATE, SEED = 4, 64, 1e-3, 42

_BARE = """
import json, sys, time
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
model_dir, out, rows, arguments, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
    args=SFTConfig(output_dir=out, **json.loads(arguments)),
    train_dataset=Dataset.from_dict({"text": json.loads(rows)}),
    processing_class=AutoTokenizer.from_pretrained(model_dir),
)
began = time.monotonic()
trainer.train()
print(json.dumps(trainer.state.global_step / (time.monotonic() - began)))
"""


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    if importlib.util.find_spec("trl") is None:
        return [Row("SFT against the bare TRL script", "not measured: trl is not installed")]
    from runners.models.builtin import write_tiny_llama

    steps, rounds = (100, 3) if quick else (400, 6)
    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as folder, deployment("--log-level", "WARNING") as (node, peer):
        model = Path(folder, "model")
        model.mkdir()
        write_tiny_llama(model)
        for number in range(2 * rounds):
            if number % 4 in (0, 3):  # which is first changes, lest one have the warmer machine
                ours.append(_ours(node, peer, str(model), steps))
            else:
                bare.append(_bare(str(model), folder, steps))
    middle_ours, middle_bare = statistics.median(ours), statistics.median(bare)
    against = f"{middle_ours / middle_bare:.3f} × the bare TRL script ({middle_bare:.1f}; {_range(bare)})"
    return [
        Row(
            f"SFT, {rounds} × {steps} steps of a tiny model through a node, median",
            f"{middle_ours:.1f} steps/s ({_range(ours)})",
            against,
            "within 2 %",
        )
    ]


def _range(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}"


def _ours(node: Node, peer: Orchestrator, model: str, steps: int) -> float:
    """Steps/s over the same call as in the bare script: the trainer's `train()`."""
    task = peer.dispatch("w1", _spec(model, steps))
    end = peer.wait_end(task, 300)
    if end["type"] != "TASK_SUCCEEDED":
        raise RuntimeError(end["error"])
    return steps / node.result(task)["training_time_seconds"]


def _spec(model: str, steps: int) -> dict[str, Any]:
    return {
        "taskType": "sft",
        "model": {"source": {"type": "huggingface", "identifier": model}, "transformers": {"dtype": "float32"}},
        "data": {"prompts": ROWS},
        "training": {
            "max_steps": steps,
            "batch_size": BATCH,
            "learning_rate": RATE,
            "max_seq_length": LENGTH,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "save_model": False,
            "logging_steps": 50,
            "seed": SEED,
            "allow_multi_gpu": False,
        },
    }


def _bare(model: str, folder: str, steps: int) -> float:
    arguments = {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "max_length": LENGTH,
        "seed": SEED,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 50,
        "disable_tqdm": True,
    }
    texts = [model, f"{folder}/bare", json.dumps(ROWS), json.dumps(arguments), str(os.cpu_count())]
    command = [sys.executable, "-c", _BARE, *texts]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return float(done.stdout.splitlines()[-1])
