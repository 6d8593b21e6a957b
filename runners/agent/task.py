"""The document of an agent task: its configuration and its items."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from runners.api import BadRequest, Context
from runners.data.sources import check_data, load_items
from runners.fields import Faults, check_spec
from runners.models.spec import Section
from runners.rows.resume import check_resume
from runners.served_model import check_name

OWN_FIELDS = ("task", "data", "configName", "agent", "resume")
DEFAULT_CONFIG = "default"


class AgentSection(Section, frozen=True, rename={"config_name": "configName"}):
    """spec.agent"""

    config_name: str | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None
    """Seconds of one run."""
    max_turns: Annotated[int, Meta(ge=1)] | None = None
    base_url: Annotated[str, Meta(pattern="^task:")] | None = None
    """`task:ID`: the model that this task serves, in place of the configuration's."""


class StaticData(Section, frozen=True):
    """spec.data of type static"""

    type: str
    task: Annotated[str, Meta(min_length=1)]


class AgentTask(msgspec.Struct, frozen=True, kw_only=True):
    """A checked document."""

    config_name: str
    config_where: str
    timeout_s: float | None
    max_turns: int | None
    tasks: tuple[str, ...]
    metadata: tuple[dict[str, Any] | None, ...]
    base_url: str | None
    batch: bool
    """Whether the tasks are rows of a data source."""


def read_agent(ctx: Context) -> AgentTask:
    """Check the document and load its data.

    Raises:
        BadRequest: naming all fields that are wrong.
        RunnerError: a data source cannot be reached.
    """
    section, (name, where) = check_agent(ctx)
    tasks, metadata, batch = _tasks(ctx, ctx.spec)
    return AgentTask(
        config_name=name,
        config_where=where,
        timeout_s=section.timeout,
        max_turns=section.max_turns,
        tasks=tasks,
        metadata=metadata,
        base_url=section.base_url,
        batch=batch,
    )


def check_agent(ctx: Context) -> tuple[AgentSection, tuple[str, str]]:
    """Check the document without loading its data; returns `spec.agent`, and the configuration's name and field.

    Raises:
        BadRequest: naming all fields that are wrong.
    """
    spec = ctx.spec
    faults = Faults()
    faults.read(lambda: check_spec(ctx, spec, "spec", OWN_FIELDS, {"agent": AgentSection}))
    section = faults.read(lambda: ctx.section("agent", AgentSection)) or AgentSection()
    config = faults.read(lambda: _config_name(spec, section))
    faults.read(lambda: check_name(section.base_url or "", "spec.agent.base_url"))
    faults.read(lambda: _check_not_merged(ctx))
    if isinstance(spec.get("data"), dict) and spec["data"].get("type") != "static":
        faults.read(lambda: check_data(ctx, spec))
    faults.read(lambda: _check_source(ctx, spec))
    faults.read(lambda: check_resume(ctx, spec))
    faults.check()
    assert config is not None, "else it was a fault"
    return section, config


def _check_source(ctx: Context, spec: dict[str, Any]) -> None:
    """Check that there is one source of tasks; a single task is checked whole."""
    data = spec.get("data")
    if data is None or spec.get("task") is not None or (isinstance(data, dict) and data.get("type") == "static"):
        _tasks(ctx, spec)
    elif not isinstance(data, dict):
        check_data(ctx, spec)


def _check_not_merged(ctx: Context) -> None:
    if ctx.merge_children:
        raise BadRequest("merge_children: agent tasks cannot be merged; send each by itself")


def _config_name(spec: dict[str, Any], section: AgentSection) -> tuple[str, str]:
    outer = spec.get("configName")
    if outer is not None and not isinstance(outer, str):
        raise BadRequest(f"spec.configName: expected a name (found {type(outer).__name__})")
    if outer is not None and section.config_name not in (None, outer):
        raise BadRequest(f"spec.configName: {outer!r}, but spec.agent.configName says {section.config_name!r}")
    where = "spec.agent.configName" if outer is None and section.config_name else "spec.configName"
    return outer or section.config_name or DEFAULT_CONFIG, where


def _tasks(ctx: Context, spec: dict[str, Any]) -> tuple[tuple[str, ...], tuple[dict[str, Any] | None, ...], bool]:
    task, data = spec.get("task"), spec.get("data")
    if task is not None and data is not None:
        raise BadRequest("spec.task: spec.data is given, too; give one of them")
    if task is not None:
        if not isinstance(task, str) or not task.strip():
            raise BadRequest(f"spec.task: expected a text (found {type(task).__name__} {task!r:.60})")
        _no_shard(spec)
        return (task,), (None,), False
    if data is None:
        raise BadRequest("spec.task: missing; give a task or spec.data")
    if isinstance(data, dict) and data.get("type") == "static":
        _no_shard(spec)
        task = ctx.check(data, StaticData, "spec.data").task
        if not task.strip():
            raise BadRequest("spec.data.task: expected a text, found white space")
        return (task,), (None,), False
    items = load_items(ctx, spec)
    for prompt, where in zip(items.prompts, items.wheres, strict=True):
        if not isinstance(prompt, str) or not prompt.strip():
            raise BadRequest(f"{where}: an agent's task is one text that is not empty")
    if not items.prompts:
        raise BadRequest("spec.data: has no rows for this task")
    return tuple(each for each in items.prompts if isinstance(each, str)), items.metadata, True


def _no_shard(spec: dict[str, Any]) -> None:
    if spec.get("shard") is not None:
        raise BadRequest("spec.shard: only the rows of a data source can be sharded; leave it out")
