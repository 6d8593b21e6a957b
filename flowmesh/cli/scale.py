"""`flowmesh scale --slurm`: brings nodes as Slurm jobs while tasks wait in the deployment's queue.

A loop over two numbers: how many tasks wait, and how many jobs there are that will take one. It never ends a job: a
node without work ends itself (`node.exit_when_idle_s`), and its allocation with it.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click
import msgspec

from flowmesh import installed
from flowmesh.cli import locate, render, slurm_jobs
from flowmesh.cli.fleet import client_of
from flowmesh.cli.slurm_jobs import Job
from flowmesh.errors import EXIT_OK, FlowMeshError
from flowmesh.queue.classes import RequirementClass
from flowmesh.queue.workers import Worker

if TYPE_CHECKING:
    from flowmesh.client import Client

WORKER = "slurm-"
"""Begins the worker id of a node in a Slurm job; `conf/slurm/flowmesh-node.sbatch` sets it: slurm-JOB-NUMBER."""


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What one look found, and what follows."""

    waiting: int
    """Tasks in the queue that a node of this script fits, as far as one was seen."""
    pending: int
    """Jobs that wait for their allocation."""
    running: int
    busy: int
    """Running jobs whose nodes have no idle worker."""
    wanted: int
    """Jobs to submit."""


def look(waiting: int, jobs: list[Job], workers: list[Worker], *, least: int, most: int) -> Look:
    """Decide how many jobs to submit.

    Each waiting task is worth one job, less those jobs that will take a task anyway: they wait for their allocation,
    their node has not registered yet, or it is idle.

    Args:
        least, most: how many jobs there may be, pending ones included.
    """
    states: dict[str, list[str]] = {}
    for worker in workers:
        if worker.alive and worker.worker_id.startswith(WORKER):
            states.setdefault(job_of(worker.worker_id), []).append(worker.status)
    pending = sum(job.pending for job in jobs)
    busy = sum(not job.pending and job.job_id in states and "IDLE" not in states[job.job_id] for job in jobs)
    coming = len(jobs) - busy
    wanted = max(min(waiting - coming, most - len(jobs)), least - len(jobs), 0)
    return Look(waiting=waiting, pending=pending, running=len(jobs) - pending, busy=busy, wanted=wanted)


def job_of(worker_id: str) -> str:
    """The job of a worker `slurm-JOB-NUMBER`, or `slurm-JOB-NUMBER-SLOT`."""
    return worker_id.removeprefix(WORKER).partition("-")[0]


def count_waiting(waiting: list[dict[str, Any]], known: list[Worker]) -> int:
    """How many tasks wait that one of these workers could take; all that wait where there are no workers."""
    total = 0
    for entry in waiting:
        wanted = msgspec.convert(entry["requires"], RequirementClass)
        fits = any(not wanted.why_not(each.hardware or {}, each.task_types, each.tags) for each in known)
        total += sum(entry["waiting"].values()) if fits or not known else 0
    return total


@click.command(help="Submit Slurm jobs that start nodes, while tasks wait in the queue. Runs until it is stopped.")
@click.option("--slurm", is_flag=True, required=True, help="Nodes are Slurm jobs (sbatch, squeue).")
@click.option("--min", "least", type=click.IntRange(0), default=0, show_default=True, help="Jobs to keep at least.")
@click.option(
    "--max", "most", type=click.IntRange(1), default=4, show_default=True, help="Jobs at most, pending ones too."
)
@click.option(
    "--script",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Batch script. Default: the installed one.",
)
@click.option("--name", default="flowmesh-node", show_default=True, metavar="NAME", help="Name of the jobs that count.")
@click.option(
    "--interval",
    type=click.FloatRange(1),
    default=30.0,
    show_default=True,
    metavar="S",
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Look once, then exit: for cron.")
@click.option("--dry-run", is_flag=True, help="Submit nothing; print what would be.")
@locate.redis_option
@locate.config_option
@locate.json_option
def scale(redis_url: str | None, config: str | None, as_json: bool, **options: Any) -> int:
    """Run the command; returns the exit code."""
    least, most, name = options["least"], options["most"], options["name"]
    if least > most:
        raise click.UsageError(f"--min {least} is above --max {most}")
    batch = options["script"] or str(installed.conf() / "slurm" / "flowmesh-node.sbatch")
    once, dry_run, interval = options["once"], options["dry_run"], options["interval"]
    known: dict[str, Worker] = {}
    with client_of(redis_url, config) as client:
        while True:
            try:
                found = _look(client, known, name, least, most)
                submitted: list[str] = []
                for _ in range(0 if dry_run else found.wanted):
                    submitted.append(slurm_jobs.submit(batch, name))
                _report(found, submitted, as_json=as_json, dry_run=dry_run)
            except FlowMeshError as error:
                if once:
                    raise
                print(f"flowmesh: {error}; trying again in {interval:g} s", file=sys.stderr, flush=True)
            if once:
                return EXIT_OK
            time.sleep(interval)


def _look(client: Client, known: dict[str, Worker], name: str, least: int, most: int) -> Look:
    """
    Args:
        known: workers of such nodes that were seen, by what they offer; is added to.
    """
    jobs = slurm_jobs.jobs(name)
    workers = client.workers()
    ours = {job.job_id for job in jobs}
    for worker in workers:
        if worker.worker_id.startswith(WORKER) and job_of(worker.worker_id) in ours and worker.hardware is not None:
            known[repr((worker.hardware, worker.task_types, worker.tags))] = worker
            while len(known) > 32:
                known.pop(next(iter(known)))
    return look(count_waiting(client.waiting(), list(known.values())), jobs, workers, least=least, most=most)


def _report(found: Look, submitted: list[str], *, as_json: bool, dry_run: bool) -> None:
    if as_json:
        render.print_json({**msgspec.to_builtins(found), "submitted": submitted, "dry_run": dry_run})
    else:
        what = f"would submit {found.wanted}" if dry_run else f"submitted {len(submitted)}"
        ids = f" ({', '.join(submitted)})" if submitted else ""
        print(
            f"{render.count(found.waiting, 'task')} waiting; {render.count(found.running, 'job')} running, "
            f"{found.busy} of them busy, {found.pending} pending; {what}{ids}"
        )
    sys.stdout.flush()
