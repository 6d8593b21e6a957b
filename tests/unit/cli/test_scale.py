"""How many jobs `flowmesh scale` submits."""

from __future__ import annotations

import pytest

from flowmesh.cli import scale
from flowmesh.cli.slurm_jobs import Job
from flowmesh.queue.workers import Worker


def worker(worker_id: str, status: str, *, alive: bool = True, types: tuple[str, ...] = ("echo",)) -> Worker:
    return Worker(
        worker_id=worker_id, status=status, task_id=None, last_task=None, hardware={}, task_types=types, tags=(),
        cost_per_hour=None, started_at=None, last_seen_s=None, alive=alive, disabled=False, drives_pipelines=False,
    )  # fmt: skip


RUNS, WAITS = [Job("1", False), Job("2", False)], [Job("3", True)]
BUSY, IDLE = worker("slurm-1-0", "RUNNING"), worker("slurm-2-0", "IDLE")


@pytest.mark.parametrize(
    ("waiting", "jobs", "workers", "bounds", "wanted"),
    [
        (5, [], [], (0, 3), 3),
        (1, [], [], (0, 3), 1),
        (0, [], [], (2, 3), 2),
        (2, WAITS, [], (0, 9), 1),
        (2, RUNS, [], (0, 9), 0),
        (2, RUNS, [BUSY, IDLE], (0, 9), 1),
        (9, [*RUNS, *WAITS], [BUSY, IDLE], (0, 3), 0),
        (9, [*RUNS, *WAITS], [BUSY, IDLE], (0, 2), 0),
        (1, RUNS, [worker("slurm-1-0", "RUNNING", alive=False), BUSY], (0, 9), 0),
        (1, RUNS, [BUSY, worker("slurm-1-1-gpu0", "IDLE"), worker("slurm-2-0", "RUNNING")], (0, 9), 0),
    ],
)
def test_jobs(waiting: int, jobs: list[Job], workers: list[Worker], bounds: tuple[int, int], wanted: int) -> None:
    assert scale.look(waiting, jobs, workers, least=bounds[0], most=bounds[1]).wanted == wanted


def test_only_tasks_that_such_a_node_fits_count_once_one_was_seen() -> None:
    waiting = [
        {"requires": {"task_type": "echo"}, "waiting": {"high": 1, "normal": 2, "low": 0}},
        {"requires": {"task_type": "sft"}, "waiting": {"high": 0, "normal": 4, "low": 0}},
    ]
    assert scale.count_waiting(waiting, []) == 7
    assert scale.count_waiting(waiting, [IDLE]) == 3
    assert scale.count_waiting(waiting, [IDLE, worker("slurm-9-0", "RUNNING", types=("sft",))]) == 7
