"""Chooses GPUs and number of ranks from the task's fields alone, before CUDA starts or a rank is forked."""

from __future__ import annotations

import os
from dataclasses import dataclass

from runners.api import BadRequest, Context, RunnerError
from runners.training.plan import Plan

WHERE = "spec.training"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Assignment of ranks to GPUs."""

    gpus: tuple[str, ...]
    """In rank order; empty for the CPU."""
    ranks: int
    """On this node."""
    nodes: int = 1
    spread: bool = False
    """One process whose model is split over all GPUs."""

    @property
    def world(self) -> int:
        return self.ranks * self.nodes

    @property
    def is_group(self) -> bool:
        return self.world > 1


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device of one rank."""

    cuda: bool
    bf16: bool
    """Whether it computes bfloat16 in hardware."""
    spread: bool = False
    local_rank: int = 0

    @property
    def name(self) -> str:
        return f"cuda:{self.local_rank}" if self.cuda else "cpu"


def lay_out(plan: Plan, ctx: Context) -> Layout:
    """
    Raises:
        BadRequest: the task asks for GPUs or ranks that it does not have.
    """
    training = plan.training
    placing = plan.model.transformers.device_map
    if placing == "cuda" and not ctx.gpus:
        raise BadRequest("spec.model.transformers.device_map: 'cuda', but this task has no GPU; use 'auto' or 'cpu'")
    if placing == "cpu" and (field := _names_gpus(plan)):
        raise BadRequest(f"{WHERE}.{field}: given, but spec.model.transformers.device_map is 'cpu'; leave one out")
    gpus = () if placing == "cpu" else _chosen(plan, ctx)
    wanted = training.nproc_per_node
    if not training.allow_multi_gpu and ((wanted or 1) > 1 or training.nnodes > 1):
        field, value = ("nproc_per_node", wanted) if (wanted or 1) > 1 else ("nnodes", training.nnodes)
        raise BadRequest(f"{WHERE}.{field}: {value}, but allow_multi_gpu is false; give one of them")
    if training.nnodes > 1 and training.rdzv_endpoint is None:
        raise BadRequest(f"{WHERE}.rdzv_endpoint: missing; {training.nnodes} nodes meet at one host:port")
    if training.nnodes == 1 and (training.rdzv_endpoint or training.node_rank):
        field = "rdzv_endpoint" if training.rdzv_endpoint else "node_rank"
        raise BadRequest(f"{WHERE}.{field}: only a run over several nodes has one; set nnodes, or leave it out")
    if gpus and wanted is not None and wanted > len(gpus):
        raise BadRequest(f"{WHERE}.nproc_per_node: {wanted} ranks, but the task has {len(gpus)} GPUs")
    ranks = (wanted or max(len(gpus), 1)) if training.allow_multi_gpu else 1
    if ranks > 1 or training.nnodes > 1:
        return Layout(gpus=gpus[:ranks], ranks=ranks, nodes=training.nnodes)
    spread = placing in ("auto", "balanced") and len(gpus) > 1
    return Layout(gpus=gpus if spread else gpus[:1], ranks=1, spread=spread)


def _chosen(plan: Plan, ctx: Context) -> tuple[str, ...]:
    """The task's chosen GPUs, the primary one first."""
    training = plan.training
    given = training.visible_devices
    if isinstance(given, str):
        given = [part.strip() for part in given.split(",") if part.strip()]
    if (field := _names_gpus(plan)) and not ctx.gpus:
        raise BadRequest(f"{WHERE}.{field}: this task has no GPU; ask for some in spec.resources.hardware.gpu")
    gpus = tuple(_gpu(item, ctx) for item in given) if given else ctx.gpus
    if len(set(gpus)) != len(gpus):
        raise BadRequest(f"{WHERE}.visible_devices: names a GPU twice")
    primary = training.primary_gpu or 0
    if primary and primary >= len(gpus):
        raise BadRequest(
            f"{WHERE}.primary_gpu: {primary}, but the task uses {len(gpus)} GPUs; the last is {len(gpus) - 1}"
        )
    return (gpus[primary], *gpus[:primary], *gpus[primary + 1 :]) if gpus else ()


def _names_gpus(plan: Plan) -> str | None:
    """The field that limits the task's GPUs."""
    training = plan.training
    if training.visible_devices:
        return "visible_devices"
    return None if training.primary_gpu is None else "primary_gpu"


def _gpu(item: int | str, ctx: Context) -> str:
    if isinstance(item, int) or item.isdigit():
        index = int(item)
        if 0 <= index < len(ctx.gpus):
            return ctx.gpus[index]
    elif item in ctx.gpus:
        return item
    raise BadRequest(f"{WHERE}.visible_devices: no GPU {item!r}; the task has {len(ctx.gpus)}: {', '.join(ctx.gpus)}")


def restrict(layout: Layout) -> None:
    """Make only the chosen GPUs visible to CUDA, in rank order. Call it before CUDA starts."""
    if layout.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(layout.gpus)


def find(layout: Layout, local_rank: int) -> Device:
    """The device of this rank. May create the CUDA context: call it only in the process that trains.

    Raises:
        RunnerError: the task has GPUs and torch does not see them.
    """
    if not layout.gpus:
        return Device(cuda=False, bf16=False, local_rank=local_rank)
    import torch

    if not torch.cuda.is_available():
        raise RunnerError(f"the task has {len(layout.gpus)} GPUs, but torch {torch.__version__} sees none")
    torch.cuda.set_device(local_rank)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 or V100 has no unit for it, only emulation
    return Device(cuda=True, bf16=bf16, spread=layout.spread, local_rank=local_rank)
