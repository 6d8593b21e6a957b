"""`flowmesh workers`: lists the workers that are registered in a deployment's Redis."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import click

from flowmesh.cli import deployment, locate, render
from flowmesh.cli.deployment import Worker
from flowmesh.cli.render import Column
from flowmesh.errors import EXIT_OK

COLUMNS = (
    Column("WORKER", least=24),
    Column("STATUS"),
    Column("TASK", least=12),
    Column("GPUS", least=10),
    Column("MEMORY", drop=2),
    Column("TAGS", least=6, drop=3),
    Column("SEEN"),
    Column("COST/H", drop=1),
)
WATCH_EVERY_S = 2.0


@click.command(help="List the workers of a deployment, with their tasks and GPUs.")
@locate.redis_option
@locate.config_option
@click.option("--watch", is_flag=True, help="Refresh every two seconds until Ctrl-C.")
@locate.json_option
def workers(redis_url: str | None, config: str | None, watch: bool, as_json: bool) -> int:
    """Run the command; returns the exit code."""
    url, _ = locate.deployment_of(redis_url, config)
    with locate.connected(url) as client:
        while True:
            found = deployment.read_workers(client)
            if watch and not as_json:
                click.clear()
            if as_json:
                render.print_json({"workers": [as_data(worker) for worker in found]})
            elif found:
                render.table(COLUMNS, [row(worker) for worker in found])
            else:
                print("no worker is registered in this Redis")
            if not watch:
                return EXIT_OK
            time.sleep(WATCH_EVERY_S)


def row(worker: Worker) -> list[str]:
    """The cells of one worker."""
    status = worker.status or "?"
    if not worker.alive:
        status = f"stale ({status})"
    elif worker.disabled:
        status = f"{status} (disabled)"
    return [
        worker.worker_id,
        status,
        worker.task_id or "",
        gpus(worker),
        memory(worker),
        ",".join(worker.tags),
        f"{render.seconds(worker.last_seen_s)} ago" if worker.last_seen_s is not None else "never",
        f"{worker.cost_per_hour:.2f}" if worker.cost_per_hour is not None else "",
    ]


def gpus(worker: Worker) -> str:
    """The worker's GPUs by model: `2x H100 80GB HBM3`, or `1x Tesla T4 15G` if the name does not include the memory."""
    return ", ".join(f"{count}x {kind}" for kind, count in Counter(map(_kind, worker.gpus)).items()) or "none"


def _kind(gpu: Mapping[str, Any]) -> str:
    name = str(gpu.get("name") or "?").removeprefix("NVIDIA ")
    return name if re.search(r"\d+GB", name) else name + _size(gpu.get("memory_total_bytes"))


def memory(worker: Worker) -> str:
    """The worker's host memory."""
    part = (worker.hardware or {}).get("memory")
    return _size(part.get("total_bytes") if isinstance(part, dict) else None).strip()


def _size(value: Any) -> str:
    return f" {render.gib(value)}" if isinstance(value, int | float) and value > 0 else ""


def as_data(worker: Worker) -> dict[str, Any]:
    """The worker for `--json`."""
    return {
        "worker_id": worker.worker_id,
        "status": worker.status,
        "alive": worker.alive,
        "disabled": worker.disabled,
        "task_id": worker.task_id,
        "task_types": worker.task_types,
        "tags": worker.tags,
        "hardware": worker.hardware,
        "last_seen_s": worker.last_seen_s,
        "cost_per_hour": worker.cost_per_hour,
        "started_at": worker.started_at,
    }
