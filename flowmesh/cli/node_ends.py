"""When a node ends by itself, in words, for `flowmesh status` and `flowmesh doctor`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from flowmesh.cli import render
from flowmesh.cli.control_types import Ends
from flowmesh.cli.findings import Finding, Level
from flowmesh.execution.time_left import TimeLeft
from flowmesh.settings.moments import SLURM_END, iso
from flowmesh.settings.schema import Settings


def lines(ends: Ends) -> Iterator[str]:
    """Of a running node."""
    if (end := ends.end) is not None:
        when = f"in {render.seconds(end.left_s)}" if end.left_s else "now"
        yield f"ends at {end.at}: drains at {end.drains_at} ({when}); tasks that take longer are not taken"
    if ends.exit_when_idle_s is not None:
        so_far = "" if ends.idle_s is None else f" (so far {render.seconds(ends.idle_s)})"
        yield f"exits when it had no task for {render.seconds(ends.exit_when_idle_s)}{so_far}"


def check(settings: Settings) -> Iterator[Finding]:
    """Of the settings on this machine."""
    in_slurm = "SLURM_JOB_ID" in os.environ
    time_left = TimeLeft.of(settings)
    if time_left.ends_at is not None and time_left.drains_at is not None:
        left_s, margin = time_left.drains_at - time.time(), render.seconds(time_left.margin_s)
        text = f"the node ends at {iso(time_left.ends_at)} and drains {margin} before"
        if left_s > 0:
            yield Finding("end", Level.OK, f"{text}; tasks of up to {render.seconds(left_s)} are taken")
        else:
            remedy = "correct or remove node.ends_at, or shorten node.ends_margin_s"
            yield Finding("end", Level.BROKEN, f"{text}: that is over, so that it would take no task", remedy)
    elif in_slurm:
        text = f"a Slurm job, but neither {SLURM_END} nor node.ends_at says when it ends"
        remedy = "start the node with conf/slurm/flowmesh-node.sbatch, which asks squeue, or set node.ends_at"
        yield Finding("end", Level.WARN, f"{text}: tasks are killed there without a checkpoint", remedy)
    if (idle_s := settings.node.exit_when_idle_s) is not None:
        yield Finding("end", Level.OK, f"the node exits when it had no task for {render.seconds(idle_s)}")
    if in_slurm:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "no GPU limit (CUDA_VISIBLE_DEVICES is not set)" if gpus is None else f"GPUs {gpus or 'none'}"
        cpus = render.count(len(os.sched_getaffinity(0)), "CPU")
        yield Finding("end", Level.NOTE, f"Slurm job {os.environ['SLURM_JOB_ID']} gives {cpus}, {shown}")
