"""Checks documents with the structs and rules of their runners, and runs nothing.

The functions are named in the table of task types, and loaded by name. They import no heavy library, and read neither
data nor weights. What depends on a node (its permits, the variables of its tasks) is not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmesh.messages.job import Job
from flowmesh.validation.checked import Checked
from runners.api import BadRequest, Context
from runners.fields import Faults

NOWHERE = "/nonexistent"
"""The folders of a task that does not run."""


def echo(task: dict[str, Any], task_type: str) -> Checked:
    from runners.echo import read_delay

    return _checked(task, task_type, read_delay)


def command(task: dict[str, Any], task_type: str) -> Checked:
    from runners.command.task import read_command

    return _checked(task, task_type, read_command)


def python(task: dict[str, Any], task_type: str) -> Checked:
    from runners.command.task import read_python

    return _checked(task, task_type, read_python)


def inference(task: dict[str, Any], task_type: str) -> Checked:
    from runners.inference.task import read_document

    return _checked(task, task_type, lambda ctx: _with_children(ctx, read_document))


def serve(task: dict[str, Any], task_type: str) -> Checked:
    from runners.serve.task import read_serve

    return _checked(task, task_type, lambda ctx: read_serve(ctx, ctx.spec))


def training(task: dict[str, Any], task_type: str) -> Checked:
    from runners.training.plan import read

    return _checked(task, task_type, lambda ctx: read(task_type, ctx))


def rag(task: dict[str, Any], task_type: str) -> Checked:
    from runners.rag.task import check_query, read_rag

    def read(ctx: Context, spec: dict[str, Any], where: str) -> None:
        faults = Faults()
        found = faults.read(lambda: read_rag(ctx, spec, where, with_key=False))
        builds_index = found is None or found.builds_index
        faults.read(lambda: check_query(spec, where, builds_index=builds_index))
        faults.check()

    return _checked(task, task_type, lambda ctx: _with_children(ctx, read))


def embedding(task: dict[str, Any], task_type: str) -> Checked:
    from runners.vectors.task import read_embedding

    def read(ctx: Context, spec: dict[str, Any], where: str) -> None:
        read_embedding(ctx, spec, where, with_key=False)

    return _checked(task, task_type, lambda ctx: _with_children(ctx, read))


def score(task: dict[str, Any], task_type: str) -> Checked:
    from runners.scoring.task import read_score

    return _checked(task, task_type, lambda ctx: _with_children(ctx, read_score))


def api(task: dict[str, Any], task_type: str) -> Checked:
    from runners.remote.task import read_api

    return _checked(task, task_type, lambda ctx: read_api(ctx, ctx.spec))


def agent(task: dict[str, Any], task_type: str) -> Checked:
    from runners.agent.task import check_agent

    return _checked(task, task_type, check_agent)


def agent_config(path: str, data: dict[str, Any]) -> Checked:
    """Check a file of the agents folder.

    Args:
        path: its path, to find the configurations that it extends.
        data: its content.
    """
    from runners.agent.config_files import check_file

    try:
        check_file(Path(path), data)
    except BadRequest as error:
        return Checked(faults=error.faults)
    return Checked()


def _with_children(ctx: Context, read: Callable[[Context, dict[str, Any], str], object]) -> None:
    """Read a task's own spec and those of the tasks that were merged into it; all faults in one error."""
    from runners.inference.merge import read_children

    faults = Faults()
    faults.read(lambda: read(ctx, ctx.spec, "spec"))
    for child in faults.read(lambda: read_children(ctx)) or ():
        faults.read(lambda child=child: read(ctx, child.spec, child.where))  # type: ignore[misc]
    faults.check()


def _checked(task: dict[str, Any], task_type: str, check: Callable[[Context], object]) -> Checked:
    job = Job(
        attempt=0, task_id="", task_type=task_type, runner="", task=task,
        out_dir=NOWHERE, results_dir=NOWHERE, cache_dir=NOWHERE, tmp_dir=NOWHERE,
    )  # fmt: skip
    ctx = Context(job)
    try:
        check(ctx)
    except BadRequest as error:
        return Checked(faults=error.faults, unused=tuple(dict.fromkeys(ctx.unused)))
    return Checked(unused=tuple(dict.fromkeys(ctx.unused)))
