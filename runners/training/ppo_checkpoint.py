"""PPO's checkpoints, in the layout of the other trainers. A folder gets its name only when it is complete."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowmesh.files.removal import clear, remove_path
from runners.api import RunnerError
from runners.training.checkpoints import STATE_FILE, steps
from runners.training.ranks import Place

VALUE_FILE = "value_head.safetensors"


def save(
    folder: Path, place: Place, accelerator: Any, parts: dict[str, Any], *, state: dict[str, Any], keep: int | None
) -> None:
    """Write checkpoint-<global_step> below `folder`. A collective.

    Args:
        parts: model (a PolicyWithValue), tokenizer, optimizer, schedule.
        keep: how many checkpoints to keep, the latest ones; None for all.
    """
    from safetensors.torch import save_file

    target = folder / f"checkpoint-{state['global_step']}"
    partial = folder / f".{target.name}.partial"
    if place.leads:
        clear(partial)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if place.on_first_node:
        torch.save(rng_state(), partial / rng_name(place))
    if place.leads:
        parts["model"].policy.save_pretrained(partial)
        parts["tokenizer"].save_pretrained(partial)
        save_file({k: v.contiguous().cpu() for k, v in parts["model"].value.state_dict().items()}, partial / VALUE_FILE)
        torch.save(parts["optimizer"].state_dict(), partial / "optimizer.pt")
        torch.save(parts["schedule"].state_dict(), partial / "scheduler.pt")
        if accelerator.scaler is not None:
            torch.save(accelerator.scaler.state_dict(), partial / "scaler.pt")
        (partial / STATE_FILE).write_text(json.dumps(state))
    accelerator.wait_for_everyone()
    if place.leads:
        clear(target)
        partial.rename(target)
        if keep is not None:
            for _, old in sorted(steps(folder), reverse=True)[keep:]:
                if left := remove_path(old):
                    logging.getLogger(__name__).warning("an old checkpoint was not removed: %s", left)
    accelerator.wait_for_everyone()


def load(folder: Path, place: Place, accelerator: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """Everything but the policy's weights, which were loaded from `folder` as a model; returns the state.

    Raises:
        RunnerError: it is not a checkpoint of this kind of run.
    """
    from safetensors.torch import load_file

    device = accelerator.device
    try:
        parts["model"].value.load_state_dict(load_file(folder / VALUE_FILE, device=str(device)))
        parts["optimizer"].load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))
        parts["schedule"].load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        if accelerator.scaler is not None and (folder / "scaler.pt").is_file():
            accelerator.scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))
        if (folder / rng_name(place)).is_file():  # else the group had another size, and random numbers differ
            set_rng_state(torch.load(folder / rng_name(place), weights_only=True))
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RunnerError(f"cannot resume from {folder}: {' '.join(str(error).split()):.500}") from error
    return state


def rng_name(place: Place) -> str:
    return "rng_state.pth" if place.world == 1 else f"rng_state_{place.rank}.pth"


def rng_state() -> dict[str, Any]:
    _, keys, *rest = np.random.get_state(legacy=True)
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.array(keys)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state_all(state["cuda"])
