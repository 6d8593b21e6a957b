"""The plan that the floors and the node's tasks of the speed steps share: same model, prompts, rows and arguments."""

from __future__ import annotations

import importlib.util
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.gpu.kit import models
from tests.gpu.kit.scene import Scene, Skip

NEW_TOKENS, DRY_NEW_TOKENS = 128, 8
STEPS, DRY_STEPS = 30, 3
BATCH = 4
LENGTH, DRY_LENGTH = 512, 64
LORA = {"r": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}
RATE = 1e-5
TRAINERS_NEED = ("trl", "datasets", "accelerate", "peft")


def plan(scene: Scene) -> dict[str, Any]:
    """What `tests.gpu.kit.bare` reads."""
    dry = scene.dry
    return {
        "model": str(scene.scratch / "model"),
        "device": "cpu" if dry else "cuda",
        "dtype": "float32" if dry else "bfloat16",
        "threads": 1 if dry else 8,
        "prompts": models.PROMPTS[: 8 if dry else None],
        "new_tokens": DRY_NEW_TOKENS if dry else NEW_TOKENS,
        "rows": models.ROWS[: 16 if dry else None],
        "lora": LORA,
        "arguments": {
            "max_steps": DRY_STEPS if dry else STEPS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": RATE,
            "max_length": DRY_LENGTH if dry else LENGTH,
            "seed": 42,
            "use_cpu": dry,
            "bf16": not dry,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 10,
            "disable_tqdm": True,
        },
    }


def why_no_training() -> str:
    """Why TRL cannot be used here; empty if it can."""
    if lacking := [name for name in TRAINERS_NEED if importlib.util.find_spec(name) is None]:
        return f"not installed: {', '.join(lacking)}"
    if importlib.util.find_spec("pyarrow") is None:
        return "datasets needs pyarrow, whose wheel (55 MB) is too large for the pack, and which is not installed here"
    if int(metadata.version("pyarrow").split(".")[0]) < 24:
        return f"datasets needs pyarrow 24, and {metadata.version('pyarrow')} is installed here"
    return ""


def floor(scene: Scene, name: str) -> float:
    """What the step `floors` measured, per second.

    Raises:
        Skip: it did not get there.
    """
    path = scene.scratch / "floors.json"
    found = json.loads(path.read_text()).get(name, {}) if path.exists() else {}
    if "per_s" not in found:
        raise Skip("its floor was not measured: see the step floors")
    return float(found["per_s"])


def model_section(scene: Scene, *, on_cpu: str | None = None) -> dict[str, Any]:
    found = plan(scene)
    options = {"dtype": found["dtype"], **({"device_map": on_cpu} if on_cpu and scene.dry else {})}
    return {"source": {"type": "huggingface", "identifier": found["model"]}, "transformers": options}


def model_folder(scene: Scene) -> Path:
    return Path(plan(scene)["model"])
