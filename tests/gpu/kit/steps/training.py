"""Steps/s of SFT and LoRA against the bare TRL script."""

from __future__ import annotations

from typing import Any

from tests.gpu.kit import speed
from tests.gpu.kit.scene import Scene, Skip

AIM = 0.95


def run(scene: Scene) -> None:
    if why := speed.why_no_training():
        raise Skip(why)
    for task_type in ("sft", "lora_sft"):
        try:
            compare(scene, task_type)
        except Skip as skip:
            scene.skip(task_type, str(skip))


def compare(scene: Scene, task_type: str) -> None:
    bare = speed.floor(scene, task_type)
    scene.wait_word("IDLE")  # the bare script was a foreign process on the GPU
    found = scene.result(scene.send(spec_of(scene, task_type)))
    steps = speed.plan(scene)["arguments"]["max_steps"]
    ours = steps / found["training_time_seconds"]
    scene.timing(
        f"{task_type}, {steps} steps",
        ok=ours >= AIM * bare,
        value=f"{ours:.2f} steps/s, {ours / bare:.2f} × the bare script",
        against=f"{bare:.2f} steps/s",
        aim=f"at least {AIM:.2f} ×",
    )


def spec_of(scene: Scene, task_type: str) -> dict[str, Any]:
    plan = speed.plan(scene)
    arguments = plan["arguments"]
    return {
        "taskType": task_type,
        "model": speed.model_section(scene, on_cpu="cpu"),
        "data": {"prompts": plan["rows"]},
        "training": {
            "max_steps": arguments["max_steps"],
            "batch_size": arguments["per_device_train_batch_size"],
            "learning_rate": arguments["learning_rate"],
            "max_seq_length": arguments["max_length"],
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "save_model": False,
            "logging_steps": arguments["logging_steps"],
            "bf16": arguments["bf16"],
            "seed": arguments["seed"],
            "allow_multi_gpu": False,
        },
        **({"lora": plan["lora"]} if task_type == "lora_sft" else {}),
    }
