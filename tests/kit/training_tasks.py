"""What the tests of training share: a way to run a task as the node does, small data, and rewards to import."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from flowmesh.messages.job import Job, Outcome
from tests.kit.paths import PERMITS
from tests.kit.training_zygote import Running, Zygote

RUNNERS = {
    "sft": "SftRunner",
    "lora_sft": "LoraSftRunner",
    "dpo": "DpoRunner",
    "ppo": "PpoRunner",
    "grpo": "GrpoRunner",
    "rloo": "RlooRunner",
    "kto": "KtoRunner",
    "reward": "RewardRunner",
}
MODEL = {"source": {"type": "huggingface", "identifier": "builtin:tiny-llama"}}

SUMS = [f"{a} plus {b} is {a + b}" for a in range(8) for b in range(8)]
PAIRS = [{"prompt": f"Say {i}.", "chosen": f" Yes, {i}.", "rejected": f" No, {i}."} for i in range(16)]
EXAMPLES = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
QUICK = {"max_steps": 12, "batch_size": 8, "learning_rate": 2e-3, "max_seq_length": 64, "logging_steps": 3}


@functools.cache
def shared() -> Path:
    """A folder for the whole session: the cache of the tasks, and the forking process's log."""
    folder = Path(tempfile.mkdtemp(prefix="flowmesh-training-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def hub() -> Path:
    """The model hub's cache of the tasks; no hub is reachable."""
    return shared() / "hub"


@functools.cache
def zygote() -> Zygote:
    started = Zygote(shared() / "zygote.log", hub())
    atexit.register(started.close)
    return started


def start(folder: Path, task_type: str, spec: dict[str, Any], *, task_id: str = "task-1", **fields: Any) -> Running:
    """Start a task whose results lie in `folder`; without a `model` it trains the built-in one."""
    out_dir, tmp_dir = folder / "results" / task_id, Path(tempfile.mkdtemp(dir=folder))
    out_dir.mkdir(parents=True, exist_ok=True)
    job = Job(
        **{
            "attempt": 1,
            "task_id": task_id,
            "task_type": task_type,
            "runner": f"runners.training.runner:{RUNNERS[task_type]}",
            "task": {"spec": {"taskType": task_type, "model": MODEL, **spec}},
            "out_dir": str(out_dir),
            "results_dir": str(folder / "results"),
            "cache_dir": str(shared() / "cache"),
            "tmp_dir": str(tmp_dir),
            "threads": 1,
            "delivers_http": True,
            "permits": PERMITS,
            **fields,
        }
    )
    return Running(zygote(), job, tmp_dir / "spool")


def run(folder: Path, task_type: str, spec: dict[str, Any], **fields: Any) -> Outcome:
    return start(folder, task_type, spec, **fields).wait()


def train(folder: Path, task_type: str, spec: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The result of a task that succeeds."""
    running = start(folder, task_type, spec, **fields)
    outcome = running.wait()
    assert outcome.ok, f"{outcome.message}\n{running.log()}"
    assert outcome.result is not None
    return outcome.result


def refused(folder: Path, task_type: str, spec: dict[str, Any], **fields: Any) -> str:
    """The message of a task that its author has to mend."""
    outcome = run(folder, task_type, spec, **fields)
    assert not outcome.ok
    assert outcome.fault in ("bad_request", "missing_dependency"), outcome
    return outcome.message


def losses(result: dict[str, Any]) -> list[float]:
    return [point["loss"] for point in result["metrics"]["loss_history"]]


def likes_e(completions: list[str], **_: Any) -> list[float]:
    """How much of each completion is the letter e."""
    return [text.count("e") / max(len(text), 1) for text in completions]


def writes_down(completions: list[str], where: list[str], **_: Any) -> list[float]:
    """What each rank is given, into a file of its own in the folder that the rows name."""
    with Path(where[0], f"rank-{os.environ.get('RANK', '0')}").open("a") as lines:
        lines.writelines(f"{completion!r}\n" for completion in completions)
    return [float(len(text)) for text in completions]


def runs_out_of_memory(completions: list[str], **_: Any) -> list[float]:
    return bytearray(1 << 60)  # type: ignore[return-value]


def says_nan(completions: list[str], **_: Any) -> list[float]:
    return [float("nan")] * len(completions)


def hangs_on_rank_1(completions: list[str], **_: Any) -> list[float]:
    if os.environ["RANK"] == "1":
        time.sleep(600)
    return [0.0] * len(completions)


def fails_on_rank_1(completions: list[str], **_: Any) -> list[float]:
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 has had enough")
    return [0.0] * len(completions)
