"""What fork servers do after their imports, so that no task has to: reading a document builds tables for its structs,
which takes tens of milliseconds the first time.

No tensor is touched here: a process that computed before it forked hands broken thread pools to its children.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from flowmesh.messages.job import Job
from runners.api import Context


def rehearse_reading(task_type: str, read: Callable[[Context], object], spec: dict[str, Any]) -> None:
    """Read `spec` as a task of this type would, which no task sees anything of."""
    job = Job(
        attempt=0, task_id="", task_type=task_type, runner="", task={"spec": spec},
        out_dir="", results_dir="", cache_dir="", tmp_dir="",
    )  # fmt: skip
    logging.getLogger(f"flowmesh.task.{task_type}").disabled = True
    try:
        read(Context(job))
    finally:
        logging.getLogger(f"flowmesh.task.{task_type}").disabled = False
