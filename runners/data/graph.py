"""`data.type: graph_template`: one prompt made from the results of earlier stages."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from flowmesh.validation.convert import nearest
from flowmesh.validation.json_paths import PathError, parse, walk
from runners.api import BadRequest, Context
from runners.data.prompts import Items
from runners.data.shard import Shard

BUILT_IN = ("two_column_briefing",)
_PLACEHOLDER = re.compile(r"\{\{(?P<literal>\w+)\}\}|\{(?P<name>\w+)\}")


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of the sections."""


class Column(Section, frozen=True):
    """One value of an earlier stage: `expr`, or `node` and `path`."""

    label: str
    expr: str | None = None
    node: str | None = None
    path: str | None = None
    default: Any = msgspec.UNSET
    """Used if the stage has no such value; without a default that is an error."""


class Options(Section, frozen=True):
    """The texts around the columns."""

    role: str | None = None
    intro: str | tuple[str, ...] | None = None
    """A text, or its lines."""
    closing: str | tuple[str, ...] | None = None


class Template(Section, frozen=True):
    """spec.data.template"""

    name: str | None = None
    text: str | None = None
    columns: tuple[Column, ...] | None = None
    options: Options | None = None
    append_system_prompt: bool | None = None
    """Put the task's system prompt after the text instead of before it."""


class GraphData(Section, frozen=True):
    """spec.data of type graph_template"""

    type: str
    template: Template


def load_graph(ctx: Context, section: dict[str, Any], shard: Shard | None, spec: dict[str, Any], where: str) -> Items:
    """See `sources.load_items`."""
    template = ctx.check(section, GraphData, where).template
    here = f"{where}.template"
    options = template.options or Options()
    upstream = spec.get("_upstreamResults") or {}
    if not isinstance(upstream, dict):
        raise BadRequest(f"spec._upstreamResults: expected a mapping of stages (found {type(upstream).__name__})")
    columns = [
        (column.label, as_text(column_value(column, upstream, f"{here}.columns[{i}]")))
        for i, column in enumerate(template.columns or ())
    ]
    for i, (label, value) in enumerate(columns):
        if value.strip() in ("", "null"):
            found = value.strip() or "empty"
            ctx.log.warning("%s.columns[%d]: %r is %s in the prompt; give it a default", here, i, label, found)
    if template.text is not None:
        prompt = fill(template.text, columns, options, f"{here}.text")
        used = {match["name"] for match in _PLACEHOLDER.finditer(template.text)}
        ctx.unused += [
            f"{here}.columns[{i}]" for i in range(len(columns)) if not {f"col{i}_value", f"col{i}_label"} & used
        ]
        given = [name for name in ("role", "intro", "closing") if getattr(options, name)]
        ctx.unused += [f"{here}.options.{name}" for name in given if name not in used]
    elif template.name is None:
        raise BadRequest(f"{here}: needs a `text`, or a `name`: {', '.join(BUILT_IN)}")
    elif template.name not in BUILT_IN:
        raise BadRequest(
            f"{here}.name: no built-in template {template.name!r}, and there is no {here}.text; "
            f"{nearest(template.name, list(BUILT_IN))}"
        )
    else:
        prompt = two_column_briefing(columns, options, here)
    rows = shard.rows(1) if shard is not None else range(1)
    return Items(
        prompts=(prompt,) * len(rows),
        metadata=(None,) * len(rows),
        wheres=(here,) * len(rows),
        system_last=bool(template.append_system_prompt),
    )


def column_value(column: Column, upstream: dict[str, Any], where: str) -> Any:
    """The value of a column.

    Raises:
        BadRequest: there is no such stage or value, and no default.
    """
    if (column.expr is None) == (column.node is None):
        raise BadRequest(f"{where}: give either `expr`, or `node` and `path`")
    if column.expr is not None and column.path is not None:
        raise BadRequest(f"{where}.path: goes with `node`; `expr` has the whole path in it")
    field = "expr" if column.expr is not None else "path"
    try:
        if column.expr is not None:
            stage, path = _split_stage(column.expr, upstream)
        else:
            stage, path = column.node or "", column.path or ""
        if stage not in upstream:
            field = "expr" if column.expr is not None else "node"
            known = ", ".join(sorted(upstream)) or "none"
            raise PathError(f"there is no result of a stage {stage!r}; stages with results: {known}")
        value = _below(stage, upstream[stage], parse(path))
    except PathError as error:
        if column.default is not msgspec.UNSET:
            return column.default
        raise BadRequest(f"{where}.{field}: {error}") from None
    if value is None and column.default is not msgspec.UNSET:
        return column.default
    return value


def _split_stage(expr: str, upstream: dict[str, Any]) -> tuple[str, str]:
    """The stage and the path of `stage.result.x`. The longest stage that fits wins: names may have dots."""
    text = expr.strip()
    if text.startswith("${") and text.endswith("}"):
        text = text[2:-1].strip()
    for stage in sorted(upstream, key=len, reverse=True):
        rest = text.removeprefix(stage)
        if text.startswith(stage) and (not rest or rest[0] in ".["):
            return stage, rest.removeprefix(".")
    return re.split(r"[.\[]", text, maxsplit=1)[0], ""


def _below(stage: str, result: Any, steps: list[str | int]) -> Any:
    """`stage.result.x` and `stage.x` mean the same, unless the result itself has a `result`."""
    if steps[:1] == ["result"] and not (isinstance(result, dict) and "result" in result):
        return walk(result, steps[1:], f"{stage}.result")
    return walk(result, steps, stage)


def as_text(value: Any) -> str:
    """A value as text in a prompt: strings unchanged, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def lines_of(text: str | tuple[str, ...] | None) -> str:
    return text if isinstance(text, str) else "\n".join(text or ())


def two_column_briefing(columns: list[tuple[str, str]], options: Options, where: str) -> str:
    """The built-in template: an intro, one bullet a column, a closing."""
    if not columns:
        raise BadRequest(f"{where}.columns: two_column_briefing needs at least one column")
    intro = lines_of(options.intro) or "Read the findings below."
    closing = lines_of(options.closing) or "Write a short briefing that brings them together."
    lines = [f"You are {options.role}.", intro] if options.role else [intro]
    return "\n".join([*lines, "", *(f"- {label}: {value}" for label, value in columns), "", closing])


def fill(text: str, columns: list[tuple[str, str]], options: Options, where: str) -> str:
    """`text` with `{col0_label}`, `{col0_value}`, …, `{role}`, `{intro}` and `{closing}` filled in.

    Braces around anything but one word stay; `{{word}}` is a literal `{word}`. Values are never looked at again.

    Raises:
        BadRequest: a word that stands for nothing.
    """
    values = {name: lines_of(getattr(options, name)) for name in ("role", "intro", "closing")}
    for i, (label, value) in enumerate(columns):
        values |= {f"col{i}_label": label, f"col{i}_value": value}

    def one(match: re.Match[str]) -> str:
        if match["literal"] is not None:
            return f"{{{match['literal']}}}"
        if match["name"] not in values:
            raise BadRequest(
                f"{where}: {{{match['name']}}} stands for nothing; known: {', '.join(values)} "
                f"(write {{{{{match['name']}}}}} for the text itself)"
            )
        return values[match["name"]]

    return _PLACEHOLDER.sub(one, text)
