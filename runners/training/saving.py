"""The result on disk: `final_model/` or `final_lora/`, whole or not there at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from runners.api import Context
from runners.training.plan import Plan

NOT_PART = ("training_args.bin", "README.md")
"""What trainers write beside the weights: pickled settings with paths of this machine, and a card about themselves."""

REFERENCE = "ref"
"""The adapter that dpo compares with, where it goes on from one; TRL saves it as a second one."""


def scratch(plan: Plan, ctx: Context) -> Path:
    """Where the weights are written before they get their name."""
    return ctx.out_dir / f".{plan.folder}.partial"


def save_trainer(trainer: Any, plan: Plan, ctx: Context) -> None:
    """Have all ranks write the trainer's model; the main rank of each node gives it its name. A collective."""
    folder = scratch(plan, ctx)
    accelerator = trainer.accelerator
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # else each rank writes its own part
    if trainer.args.should_save:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    trainer.save_model(str(folder))
    accelerator.wait_for_everyone()
    if trainer.args.should_save:
        publish(folder, ctx.out_dir / plan.folder)


def publish(folder: Path, target: Path) -> None:
    """Give a finished folder its name; an older one of that name (a retry's) is replaced."""
    for name in NOT_PART:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / REFERENCE, ignore_errors=True)
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
