"""Writes the result, `final_model/` or `final_lora/`, which is complete once it has its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowmesh.files.removal import clear
from runners.api import Context
from runners.training.plan import Plan

NOT_PART = ("training_args.bin", "README.md")
"""Files of trainers that are not part of a result: pickled settings with local paths, and a model card."""

REFERENCE = "ref"
"""The second adapter that TRL saves where dpo continues one: its reference."""


def scratch(plan: Plan, ctx: Context) -> Path:
    """Folder for the weights until they are complete."""
    return ctx.out_dir / f".{plan.folder}.partial"


def save_trainer(trainer: Any, plan: Plan, ctx: Context) -> None:
    """Save the trainer's model on all ranks, then rename it on each node's main rank. A collective."""
    folder = scratch(plan, ctx)
    accelerator = trainer.accelerator
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # else each rank writes its own part
    if trainer.args.should_save:
        clear(folder)
    accelerator.wait_for_everyone()
    trainer.save_model(str(folder))
    accelerator.wait_for_everyone()
    if trainer.args.should_save:
        save_generation(accelerator.unwrap_model(trainer.model), folder, plan)
        publish(folder, ctx.out_dir / plan.folder)


def save_generation(model: Any, folder: Path, plan: Plan) -> None:
    """Save what ends an answer beside an adapter: its base model's files may not know the chat template's end."""
    config = getattr(model, "generation_config", None)
    if plan.lora is not None and config is not None and plan.kind.head == "causal":
        config.save_pretrained(folder)


def publish(folder: Path, target: Path) -> None:
    """Rename a finished folder to `target`, replacing one of an earlier attempt."""
    for name in NOT_PART:
        (folder / name).unlink(missing_ok=True)
    clear(folder / REFERENCE)
    clear(target)
    folder.rename(target)
