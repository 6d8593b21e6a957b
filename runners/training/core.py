"""Runs every training task: plan, fetch, ranks, load, train, save, result.

Trainers differ by their row in `kinds`, and by `trl_job` or `ppo` between load and save.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
import sys
import time
from typing import Any

import msgspec

from runners.api import BadRequest, Context, MissingDependency, RunnerError
from runners.gang import gang_of, of_member
from runners.models.code import may_run_code
from runners.models.contents import check_attention
from runners.models.sources import Source
from runners.training import checkpoints, costs, devices, groups, inputs, models, nodes, ranks, torchrun
from runners.training.arguments import checkpoints_dir
from runners.training.checkpoints import Start
from runners.training.devices import Layout
from runners.training.faults import explain
from runners.training.inputs import Inputs
from runners.training.plan import Plan, read
from runners.training.progress import Meter
from runners.training.ranks import Place, Report
from runners.training.setup import Setup, TrainingJob
from runners.training.step_notes import StepNotes

OF_MEMBER = ("steps", "world_size", "device", "peak_host_bytes", "peak_gpu_bytes")
"""Metrics that a member of a gang reports beside rank 0, which reports all."""
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "trl")


def run(task_type: str, ctx: Context) -> dict[str, Any]:
    """Run a training task; returns its result.

    Raises:
        BadRequest, MissingDependency, RunnerError, Cancelled: as `Runner.run` says.
    """
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            raise MissingDependency(library)
    plan = read(task_type, ctx)
    layout = devices.lay_out(plan, ctx)
    ctx.check_cancelled()
    ctx.phase("fetch")
    fetched = inputs.fetch(plan, ctx)
    devices.restrict(layout)
    quiet()
    if layout.nodes > 1:
        reports = torchrun.run(plan, layout, ctx, fetched)
    elif layout.is_group:
        ctx.phase("ranks")
        reports = groups.run(
            layout,
            ctx,
            lambda place, own, listener, port: train(plan, own, fetched, layout, place, store=(listener, port)),
        )
    else:
        result = train(plan, ctx, fetched, layout, Place())
        return with_peaks(result, [_own_report(result)])
    ctx.finish()
    leader = reports[0]
    gang = gang_of(ctx)
    ctx.phases.update(leader.phases)
    ctx.archives.extend(leader.archives)
    ctx.warnings.extend(each for each in leader.warnings if each not in ctx.warnings)
    assert leader.result is not None, "a good report has a result"
    result = with_peaks(leader.result, reports)
    if gang is None or gang.rank == 0:
        return result
    return {**of_member(gang), "metrics": {name: result["metrics"].get(name) for name in OF_MEMBER}}


def train(
    plan: Plan,
    ctx: Context,
    fetched: Inputs,
    layout: Layout,
    place: Place,
    *,
    store: tuple[socket.socket, int] | None = None,
) -> dict[str, Any]:
    """Load, train and save on one rank, alone or in a group. Returns the result.

    Args:
        store: rendezvous of a forked group's ranks (see `ranks.join`).
    """
    import torch

    torch.set_num_threads(ranks.threads(ctx, place))
    energy = costs.EnergyMeter(layout.gpus) if place.leads_node else None
    stage = "loaded"
    try:
        ctx.phase("load")
        setup = set_up(plan, ctx, fetched, layout, place, store=store)
        job = load(setup)
        ctx.check_cancelled()
        stage = "trained"
        ctx.phase("train")
        began = time.monotonic()
        job.train()
        seconds = time.monotonic() - began
        if setup.meter.stopped is not None:
            ctx.log.info("stopped at step %d of %d", setup.meter.step, setup.meter.total)
            raise setup.meter.stopped
        if setup.meter.step == 0:
            raise RunnerError("not one step was trained; spec.training.batch_size or max_steps leave nothing to do")
        stage = "saved"
        if plan.training.save_model:
            ctx.phase("save")
            job.save()
            if place.leads:
                ctx.archive(plan.folder)
        result = result_of(setup, job, seconds)
        if energy is not None:
            result["metrics"] |= energy.read()
        return result
    except RunnerError:
        raise
    except Exception as error:
        if clear := explain(error, stage):
            raise clear from error
        raise


def set_up(
    plan: Plan,
    ctx: Context,
    fetched: Inputs,
    layout: Layout,
    place: Place,
    *,
    store: tuple[socket.socket, int] | None,
) -> Setup:
    """Choose the device, join the other ranks, and find where the run starts."""
    from transformers import set_seed

    set_seed(plan.training.seed)
    device = devices.find(layout, place.local_rank)
    start = checkpoints.start_of(plan, ctx, fetched.checkpoint)
    plan = trusted(plan, ctx, start)
    start = models.merged_start(plan, start, ctx, write=place.leads_node)
    if start.resume is not None:
        checkpoints.check_world(start.resume, place.world)
    if place.world > 1:
        ranks.join(place, device, store, _timeout_s(plan))
    agree = ranks.agreement(place)
    in_gang = gang_of(ctx) is not None
    shared = nodes.share_folder(ctx, place, agree) if in_gang else layout.nodes == 1
    checkpoints_dir(ctx).mkdir(parents=True, exist_ok=True)
    meter = Meter(
        ctx,
        agree,
        scaled=plan.training.fp16,
        saves_every_s=plan.training.save_on_time_s,
        notes=StepNotes(checkpoints_dir(ctx)) if place.leads or (place.leads_node and not shared) else None,
    )
    if layout.nodes > 1:
        start = _agreed(start, ctx, meter)
    return Setup(
        plan=plan,
        ctx=ctx,
        fetched=fetched,
        layout=layout,
        place=place,
        device=device,
        meter=meter,
        start=start,
        parts_together=shared or not in_gang,
    )


def trusted(plan: Plan, ctx: Context, start: Start) -> Plan:
    """The plan with `trust_remote_code` only where the model brings code that the operator trusts.

    Raises:
        BadRequest: it brings other code.
    """
    given, where = plan.model.transformers, "spec.model.transformers.trust_remote_code"
    check_attention(ctx, given.attn_implementation, "spec.model.transformers.attn_implementation")
    sources = [start.weights]
    if start.resume is not None and not start.resume.is_relative_to(ctx.out_dir):
        sources.append(Source(path=str(start.resume), revision=None, shown=start.resume.name, where=where))
    found = [may_run_code(ctx, source, given.trust_remote_code, where) for source in sources]
    changed = msgspec.structs.replace(given, trust_remote_code=any(found))
    return dataclasses.replace(plan, model=msgspec.structs.replace(plan.model, transformers=changed))


def load(setup: Setup) -> TrainingJob:
    """Load model, data and trainer."""
    if setup.plan.kind.trainer:
        from runners.training.trl_job import TrlJob

        return TrlJob(setup)
    from runners.training.ppo import PpoJob

    return PpoJob(setup)


def _agreed(start: Start, ctx: Context, meter: Meter) -> Start:
    """The start that all nodes share: a checkpoint that only some nodes have is ignored.

    Raises:
        RunnerError: the task named the checkpoint itself, and other nodes see another.
    """
    step = -1 if start.resume is None else checkpoints.step_of(start.resume)
    least, most = -meter.furthest(-step), meter.furthest(step)
    if least == most:
        return start
    if step == -1 or (start.resume is not None and start.resume.parent == checkpoints_dir(ctx)):
        ctx.log.warning(
            "nodes have checkpoints of different steps: all start from the beginning; to continue, they need one "
            "RESULTS_DIR that all of them see"
        )
        return dataclasses.replace(start, resume=None)
    raise RunnerError(
        f"this node resumes from step {step}, others from {least if most == step else most}; "
        "name a folder that all nodes see in spec.training.resume_from_path"
    )


def quiet() -> None:
    """Disable progress bars and telemetry, also in libraries that a fork server has imported already."""
    os.environ |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false"),
    }
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
        vars(constants)["HF_HUB_DISABLE_TELEMETRY"] = True
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.disable_progress_bars()
    from transformers.utils import logging

    logging.disable_progress_bar()


def _timeout_s(plan: Plan) -> int:
    given = plan.training.trainer_args.get("ddp_timeout", ranks.DEFAULT_TIMEOUT_S)
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise BadRequest(f"spec.training.trainer_args.ddp_timeout: seconds are needed, found {given!r}")
    return given


def result_of(setup: Setup, job: TrainingJob, seconds: float) -> dict[str, Any]:
    """The task's result, as in docs/tasks.md. Delivery adds the archive's fields."""
    plan, ctx = setup.plan, setup.ctx
    result: dict[str, Any] = {
        "task_id": ctx.task_id,
        "training_successful": True,
        "training_time_seconds": round(seconds, 3),
        "error_message": None,
        "model_name": job.start.weights.shown,
        "dataset_size": job.dataset_size,
        "dropped_rows": job.dropped,
        "truncated_rows": job.truncated,
        "output_dir": str(ctx.out_dir),
        "checkpoints_dir": str(checkpoints_dir(ctx)),
        "resume_from_path": str(job.start.resume) if job.start.resume is not None else None,
    }
    if setup.meter.evaluations:
        kept = setup.meter.evaluations[-1] if job.best_step is None else setup.meter.evaluation_at(job.best_step)
        result |= {"eval_loss": kept.get("eval_loss"), "eval_dataset_size": job.eval_size}
    if plan.training.save_model and setup.place.leads:
        result[f"{plan.folder}_path"] = str(ctx.out_dir / plan.folder)
    if (lost := setup.meter.lost_steps) is not None:
        result["lost_steps"] = lost
    result["metrics"] = {
        **setup.meter.summary(samples_a_step=job.samples_a_step),
        **job.describe(),
        "device": "cuda" if setup.device.cuda else "cpu",
        "world_size": setup.layout.world,
    }
    return result


def _own_report(result: dict[str, Any]) -> Report:
    return Report(
        rank=0,
        ok=True,
        when=time.monotonic(),
        result=result,
        peak_host_bytes=costs.peak_host_bytes(),
        peak_gpu_bytes=costs.peak_gpu_bytes(),
    )


def with_peaks(result: dict[str, Any], reports: list[Report]) -> dict[str, Any]:
    """Add the peak memory of all ranks of this node."""
    result["metrics"] |= {
        "peak_host_bytes": sum(report.peak_host_bytes for report in reports),
        "peak_gpu_bytes": sum(report.peak_gpu_bytes for report in reports),
    }
    return result
