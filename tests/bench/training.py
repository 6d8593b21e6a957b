"""SFT through a node against the bare TRL script with the same arguments, taken in turn."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.measure import Row, deployment

ROWS = [f"row {n} of the training data says that {n} plus {n} is {2 * n}" for n in range(64)]
BATCH, LENGTH, RATE, SEED = 4, 64, 1e-3, 42

_BARE = """
import json, sys
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
trainer.train()
print(json.dumps(trainer.state.log_history[-1]["train_steps_per_second"]))
"""


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    if importlib.util.find_spec("trl") is None:
        return [Row("SFT against the bare TRL script", "not measured: trl is not installed")]
    from runners.models.builtin import write_tiny_llama

    steps, rounds = (100, 1) if quick else (400, 4)
    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as folder, deployment("--log-level", "WARNING") as (node, peer):
        model = Path(folder, "model")
        model.mkdir()
        write_tiny_llama(model)
        for _ in range(rounds):
            task = peer.dispatch("w1", _spec(str(model), steps))
            end = peer.wait_end(task, 300)
            if end["type"] != "TASK_SUCCEEDED":
                raise RuntimeError(end["error"])
            ours.append(node.result(task)["metrics"]["steps_per_s"])
            bare.append(_bare(str(model), folder, steps))
    mean_ours, mean_bare = sum(ours) / len(ours), sum(bare) / len(bare)
    return [
        Row(
            f"SFT, {rounds} × {steps} steps of a tiny model through a node",
            f"{mean_ours:.1f} steps/s ({min(ours):.0f} to {max(ours):.0f})",
            f"{mean_ours / mean_bare:.3f} × the bare TRL script ({mean_bare:.1f}; {min(bare):.0f} to {max(bare):.0f})",
            "within 2 %",
        )
    ]


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
    env = {**os.environ, "GOMP_SPINCOUNT": "1000", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return float(done.stdout.splitlines()[-1])
