"""How a group keeps its model: a copy a rank (DDP), or spread over the ranks by DeepSpeed's ZeRO or torch's FSDP."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import socket
from dataclasses import dataclass, field
from typing import Any

from runners.api import BadRequest, Context, MissingDependency
from runners.models.sources import local_path
from runners.training.devices import Device, Layout
from runners.training.plan import Plan
from runners.training.settings import ShardedTraining
from runners.training.trainer_allowed import check_deepspeed

DEFAULT_STAGE = 2
GATHER = "stage3_gather_16bit_weights_on_model_save"
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
"""A process that is no rank of a group is a group of one to DeepSpeed."""
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}


@dataclass(frozen=True)
class Sharding:
    """What was picked, in words for the result, and the trainer's arguments for it."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


def pick(plan: Plan, ctx: Context, layout: Layout, device: Device) -> Sharding:
    """What the task asks for; else, with `auto_deepspeed`, what is there.

    Raises:
        BadRequest: what it asks for cannot be had on this device.
        MissingDependency: it asks for DeepSpeed, which is not installed.
    """
    training = plan.training
    if isinstance(training, ShardedTraining):
        if training.deepspeed:
            if not _has_deepspeed():
                raise MissingDependency("deepspeed", "spec.training.deepspeed")
            configuration = _configuration(training.deepspeed, ctx)
            check_deepspeed(ctx, configuration, "spec.training.deepspeed")
            return _deepspeed(configuration, plan, device)
        quantised = _quantised(plan)
        if training.fsdp:
            if quantised:
                raise BadRequest(f"spec.training.fsdp: {quantised} weights cannot be spread by it; leave one out")
            return _fsdp(training.fsdp, layout, device)
        if layout.is_group and device.cuda and training.auto_deepspeed:
            if _has_deepspeed():
                return _deepspeed(automatic(training.stage or DEFAULT_STAGE), plan, device)
            if quantised:
                return Sharding(f"ddp (auto_deepspeed: {quantised} weights are not spread without deepspeed)")
            return Sharding("fsdp2 (auto_deepspeed: deepspeed is not installed)", dict(FSDP))
        if training.stage is not None and layout.is_group and not device.cuda and training.auto_deepspeed:
            ctx.log.warning("auto_deepspeed shards on GPUs; on the CPU each rank keeps the whole model (ddp)")
    if layout.is_group:
        return Sharding("ddp")
    return Sharding("model spread over the GPUs" if layout.spread else "none")


def _quantised(plan: Plan) -> str | None:
    """The field by which the weights are loaded in a few bits, which FSDP cannot cut up."""
    options = plan.model.transformers
    return "load_in_4bit" if options.load_in_4bit else "load_in_8bit" if options.load_in_8bit else None


def _has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def automatic(stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration of that ZeRO stage that takes everything else from the trainer."""
    auto = "auto"
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": auto},
        "fp16": {"enabled": auto},
        "gradient_accumulation_steps": auto,
        "gradient_clipping": auto,
        "train_batch_size": auto,
        "train_micro_batch_size_per_gpu": auto,
    }


def _configuration(given: dict[str, Any] | str, ctx: Context) -> dict[str, Any]:
    if isinstance(given, dict):
        return copy.deepcopy(given)
    path = local_path(ctx, given, "spec.training.deepspeed")
    try:
        found = json.loads(ctx.reach.read_bytes(path))
    except OSError as error:
        raise BadRequest(f"spec.training.deepspeed: cannot read {given!r}: {error.strerror or error}") from None
    except ValueError:
        raise BadRequest(f"spec.training.deepspeed: {given!r} is not JSON") from None
    if not isinstance(found, dict):
        raise BadRequest(f"spec.training.deepspeed: {str(path)!r} holds no JSON object")
    return found


def _deepspeed(configuration: dict[str, Any], plan: Plan, device: Device) -> Sharding:
    zero = configuration.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage == 3 and not zero.setdefault(GATHER, True) and plan.training.save_model:
        raise BadRequest(
            f"spec.training.deepspeed.zero_optimization.{GATHER}: false leaves no model to save; leave it out"
        )
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    if not device.cuda:
        # Must come before the trainer's arguments: without it their check counts one rank.
        import deepspeed  # type: ignore[import-not-found,unused-ignore]

        deepspeed.init_distributed(dist_backend="gloo")
    return Sharding(f"deepspeed zero-{stage}", {"deepspeed": configuration})


def _fsdp(given: bool | str | dict[str, Any], layout: Layout, device: Device) -> Sharding:
    where = "spec.training.fsdp"
    if not device.cuda:
        raise BadRequest(f"{where}: accelerate shards on GPUs only, and this task has none; leave it out")
    if not layout.is_group:
        raise BadRequest(f"{where}: one rank has nobody to share with; use two GPUs or more, or leave it out")
    if isinstance(given, str):
        return Sharding(f"fsdp ({given})", {"fsdp": given})
    if isinstance(given, dict):
        return Sharding("fsdp2", {"fsdp": True, "fsdp_config": {**FSDP["fsdp_config"], **given}})  # type: ignore[dict-item]
    return Sharding("fsdp2", dict(FSDP))
