"""JSON Schemas of task documents, configurations of agents and the node's file, made from the structs that read them.

Where a schema cannot say what the structs accept, it accepts more than they do, with one exception: numbers written as
text, which training sections take.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from flowmesh.messages.output import Output
from flowmesh.messages.wire import MergedChild, NodeSpec
from flowmesh.settings.schema import Settings
from flowmesh.tasks.catalogue import AGENT_TYPE, BUILTIN, TaskType
from flowmesh.validation.unused import ANY, TABLE, block_of

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_REF = "#/$defs/{name}"
_PREFIX = "#/$defs/"


def task_schema(types: Iterable[TaskType] = BUILTIN) -> dict[str, Any]:
    """The schema of a task document, with a branch for each type that names its sections."""
    named = [kind for kind in types if kind.sections]
    sections = {kind.name: _load(kind.sections)(kind.name) for kind in named}
    wanted: list[Any] = [NodeSpec, Output, MergedChild]
    for own in sections.values():
        wanted += [each for value in own.values() for each in (value.values() if isinstance(value, dict) else [value])]
    schemas, defs = msgspec.json.schema_components(wanted, ref_template=_REF)
    node_spec, output, child = schemas[:3]
    rest = iter(schemas[3:])
    branches = []
    for kind in named:
        properties = {}
        for name, value in sections[kind.name].items():
            if isinstance(value, dict):
                made = _by_type({tag: next(rest) for tag in value})
                for branch in made["allOf"]:
                    _add_unused(branch["then"], name, defs)
            else:
                made = next(rest)
                _add_unused(made, name, defs)
            properties[name] = _or_null(made)
        branches.append(
            {
                "if": {"properties": {"taskType": {"const": kind.name}}, "required": ["taskType"]},
                "then": {"properties": properties},
            }
        )
    _add_unused(output, "output", defs)
    common = defs.pop(node_spec["$ref"].removeprefix(_PREFIX))["properties"]
    common["output"] = _or_null(output)
    known = [kind.name for kind in named]
    common["taskType"] = {
        "anyOf": [{"enum": known}, {"type": "string"}],
        "description": "Another package's type is text.",
    }
    return {
        "$schema": DRAFT,
        "title": "FlowMesh task",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": ["string", "null"]},
            "kind": {"type": ["string", "null"]},
            "metadata": {"type": ["object", "null"]},
            "spec": {"type": "object", "required": ["taskType"], "properties": common, "allOf": branches},
            "merge_children": _or_null({"type": "array", "items": child}),
        },
        "$defs": defs,
    }


def agent_schema() -> dict[str, Any]:
    """The schema of a configuration of agents. Nothing is required: what it extends may have it."""
    (schema,), defs = msgspec.json.schema_components([_load(AGENT_TYPE)()], ref_template=_REF)
    for each in defs.values():
        each.pop("required", None)
        for name, value in each.get("properties", {}).items():
            each["properties"][name] = _or_null(value)
    defs[schema["$ref"].removeprefix(_PREFIX)]["properties"]["extends"] = {"type": "string"}
    return {"$schema": DRAFT, "title": "FlowMesh agents", **schema, "$defs": defs}


def node_schema() -> dict[str, Any]:
    """The schema of the node's file."""
    (schema,), defs = msgspec.json.schema_components([Settings], ref_template=_REF)
    return {"$schema": DRAFT, "title": "FlowMesh node", **schema, "$defs": defs}


def _load(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


def _by_type(schemas: dict[str, Any]) -> dict[str, Any]:
    """A section whose field `type` chooses its other fields."""
    branches = [
        {"if": {"properties": {"type": {"const": tag}}, "required": ["type"]}, "then": schema}
        for tag, schema in schemas.items()
    ]
    return {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": sorted(schemas)}},
        "allOf": branches,
    }


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    return {"anyOf": [schema, {"type": "null"}]}


def _add_unused(schema: Any, block: str, defs: dict[str, Any]) -> None:
    """Let a section and those below it have the fields that are accepted there without effect."""
    if isinstance(schema, list):
        for each in schema:
            _add_unused(each, block, defs)
    elif not isinstance(schema, dict):
        return
    elif "$ref" in schema:
        _add_unused(defs[schema["$ref"].removeprefix(_PREFIX)], block, defs)
    elif "anyOf" in schema or "items" in schema:
        _add_unused(schema.get("anyOf", schema.get("items")), block, defs)
    elif "properties" in schema:
        for name, inner in list(schema["properties"].items()):
            _add_unused(inner, f"{block}.{name}", defs)
        if schema.get("additionalProperties") is False:
            for entry in TABLE:
                if entry.block == "*":
                    schema["patternProperties"] = {f"^({'|'.join(entry.names)})$": {}}
                elif entry.block == block_of(f"spec.{block}"):
                    for name in entry.names:
                        schema["properties"].setdefault(name, _unused(entry.only, entry.why))


def _unused(only: Any, why: str) -> dict[str, Any]:
    about = {"description": f"No effect: {why}."}
    return about if only is ANY else {"enum": [*only, None], **about}
