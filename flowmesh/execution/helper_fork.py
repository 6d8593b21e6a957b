"""The request for a child that works for the node itself, and not for a task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flowmesh.execution.layout import Layout
from flowmesh.processes import environ
from flowmesh.processes.limits import Limits
from flowmesh.processes.protocol import Fork


def helper_fork(
    layout: Layout,
    attempt: int,
    target: str,
    folder: Path,
    log: str,
    *,
    env: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    as_task: bool = False,
) -> Fork:
    """A child with one thread and no GPU, whose own folder is also its TMPDIR.

    Args:
        attempt: its number, which shows what it is.
        target: `module:function`, called with the pipe and the folder.
        log: a file's name in the node's folder of logs.
        env: variables besides those that every child gets.
        limits: None: none but the node's own.
        as_task: whether it sees what tasks see of the node's environment, such as their user's home.
    """
    output = str(layout.log_dir.resolve() / log)  # no link is followed where it runs as the tasks' user
    return Fork(
        attempt=attempt,
        target=target,
        spool=str(folder),
        cwd=str(layout.work_dir),
        stdout=output,
        stderr=output,
        env=environ.for_task(
            layout.task_env if as_task else layout.base_env,
            task_env=dict(env or {}),
            tmp_dir=str(folder),
            threads=1,
            gpus=(),
            mark=layout.mark_of(attempt),
        ),
        limits=limits or Limits(),
    )
