"""Turns plain data into structs, and what is wrong with it into one line that a person can act on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from flowmesh.errors import FieldError

__all__ = ["FieldError", "convert", "nearest"]

T = TypeVar("T")

_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<key>key in )?(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[\.\.\.\]")
_SHOWN = 80


def nearest(word: str, known: list[str]) -> str:
    """A tail for an error: which of `known` was probably meant, else all of them."""
    if match := difflib.get_close_matches(word, known, n=1, cutoff=0.6):
        return f"did you mean {match[0]!r}?"
    return "known: " + ", ".join(sorted(known)) if known else "nothing is allowed here"


def convert(value: Any, into: type[T], *, where: str, strict: bool = True) -> T:
    """`value` (what a JSON, YAML or TOML decoder gives) as an `into`.

    Args:
        where: the dotted path of `value` in its document, for the error; empty for the top.
        strict: False also takes "3" for 3 and "true" for True, as environment variables need.

    Raises:
        FieldError: names the path, what was found and what is allowed; for an unknown field the nearest known one.
    """
    try:
        return msgspec.convert(value, into, strict=strict)
    except msgspec.ValidationError as error:
        what, path = _explain(str(error), value, into)
    dotted = ".".join(part for part in (where, path) if part).replace(".[", "[")
    raise FieldError(f"{dotted or 'the document'}: {what}", dotted)


def _explain(message: str, value: Any, into: Any) -> tuple[str, str]:
    """msgspec's message as (what is wrong, dotted path below `value`)."""
    match = _AT.match(message)
    assert match is not None, "the pattern matches any text"
    what, path = match["what"], (match["path"] or "$").removeprefix("$")
    found, schema = _descend(path, value, inspect.type_info(into))
    path = path.lstrip(".")
    if unknown := _UNKNOWN.fullmatch(what):
        known = _field_names(schema, found)
        name = unknown["name"]
        return f"unknown field; {nearest(name, known)}", f"{path}.{name}" if path else name
    if missing := _MISSING.fullmatch(what):
        name = missing["name"]
        return "missing; it is required", f"{path}.{name}" if path else name
    if "[...]" in path or match["key"]:
        return _lower(what), path
    return f"{_lower(what)} (found {_show(found)})", path


def _descend(path: str, value: Any, schema: inspect.Type) -> tuple[Any, inspect.Type]:
    for step in _STEP.finditer(path):
        name, index = step[1], step[2]
        if name is not None:
            schema = _field_type(schema, name, value)
            value = value.get(name) if isinstance(value, Mapping) else None
        else:
            schema = _item_type(schema)
            value = value[int(index)] if index is not None and isinstance(value, list | tuple) else None
    return value, schema


def _structs(schema: inspect.Type, value: Any) -> list[inspect.StructType]:
    """The structs that `schema` allows here; where tags tell them apart and `value` has one, only that one."""
    types = schema.types if isinstance(schema, inspect.UnionType) else (schema,)
    structs = [t for t in types if isinstance(t, inspect.StructType)]
    if isinstance(value, Mapping):
        tagged = [t for t in structs if t.tag_field is not None and value.get(t.tag_field) == t.tag]
        return tagged or structs
    return structs


def _field_names(schema: inspect.Type, value: Any) -> list[str]:
    structs = _structs(schema, value)
    return sorted({field.encode_name for struct in structs for field in struct.fields})


def _field_type(schema: inspect.Type, name: str, value: Any) -> inspect.Type:
    for struct in _structs(schema, value):
        for field in struct.fields:
            if field.encode_name == name:
                return field.type
    types = schema.types if isinstance(schema, inspect.UnionType) else (schema,)
    for each in types:
        if isinstance(each, inspect.DictType):
            return each.value_type
    return inspect.AnyType()


def _item_type(schema: inspect.Type) -> inspect.Type:
    types = schema.types if isinstance(schema, inspect.UnionType) else (schema,)
    for each in types:
        if isinstance(each, inspect.ListType | inspect.VarTupleType):
            return each.item_type
        if isinstance(each, inspect.DictType):
            return each.value_type
    return inspect.AnyType()


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
