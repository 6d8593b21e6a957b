"""Finds the faults in data that does not fit its type: where each is, what was found there, and what is allowed."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import inspect

from flowmesh.redaction import is_secret
from flowmesh.validation.describe import Path, expected, found, nearest
from flowmesh.validation.schemas import (
    LISTS,
    bare,
    choose,
    fits,
    item_type,
    members,
    names,
    tags,
)

Fault = tuple[Path, str]
"""Where, below the value that was checked, and what is wrong there."""

_AT = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)


class FaultFinder:
    """Walks refused data beside its type.

    Args:
        strict: as for `msgspec.convert`.
    """

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict

    def faults(self, value: Any, declared: inspect.Type, path: Path) -> Iterator[Fault]:
        """The faults of `value`, which is at `path`; none where nothing that can be judged here is wrong."""
        schema = choose(value, bare(declared))
        match schema:
            case inspect.StructType() if isinstance(value, Mapping):
                yield from self._struct(value, schema, path)
            case inspect.UnionType() if (tagged := tags(schema)) and isinstance(value, Mapping):
                yield self._tag(value, tagged, path)
            case inspect.DictType() if isinstance(value, Mapping):
                yield from self._dict(value, schema, path)
            case _ if isinstance(schema, LISTS) and isinstance(value, list | tuple):
                yield from self._list(value, schema, path)
            case _ if fits(value, schema, strict=self._strict) is False:
                yield path, self._mismatch(value, schema, declared, is_secret(path))

    def _struct(self, value: Mapping[Any, Any], schema: inspect.StructType, path: Path) -> Iterator[Fault]:
        wrong = False
        for fault in self._fields(value, schema, path):
            wrong = True
            yield fault
        if not wrong:
            yield from self._post_init(value, schema, path)

    def _fields(self, value: Mapping[Any, Any], schema: inspect.StructType, path: Path) -> Iterator[Fault]:
        fields = {field.encode_name: field for field in schema.fields}
        for name, item in value.items():
            if not isinstance(name, str):
                yield path, f"a field's name must be text, found {found(name)}; put it in quotes"
            elif name in fields:
                yield from self.faults(item, fields[name].type, (*path, name))
            elif name == schema.tag_field:
                if item != schema.tag:
                    yield self._tag(value, {schema.tag: schema.tag_field}, path)
            elif schema.forbid_unknown_fields:
                yield (*path, name), f"unknown field; {nearest(name, fields)}"
        for name, field in fields.items():
            if field.required and name not in value:
                yield (*path, name), "missing; it is required"

    def _post_init(self, value: Any, schema: inspect.StructType, path: Path) -> Iterator[Fault]:
        """What the struct's `__post_init__` refuses, which shows only once every field fits."""
        try:
            msgspec.convert(value, schema.cls, strict=self._strict)
        except msgspec.ValidationError as error:
            if " - at `" not in str(error):
                yield path, str(error)
        except UnicodeEncodeError as error:
            yield path, fault_of_message(error)[1]

    def _tag(self, value: Mapping[Any, Any], tagged: Mapping[Any, str], path: Path) -> Fault:
        field = next(iter(tagged.values()))
        allowed = f"expected one of {', '.join(sorted(map(str, tagged)))}"
        if field not in value:
            return (*path, field), f"missing; {allowed}"
        tag = value[field]
        hint = f"; {nearest(tag, map(str, tagged))}" if isinstance(tag, str) else ""
        return (*path, field), f"{allowed}, found {found(tag)}" + (hint if "did you mean" in hint else "")

    def _dict(self, value: Mapping[Any, Any], schema: inspect.DictType, path: Path) -> Iterator[Fault]:
        for key, item in value.items():
            if fits(key, bare(schema.key_type), strict=self._strict) is False:
                if isinstance(key, str):
                    yield (*path, key), f"its name must be {expected(schema.key_type)}"
                else:
                    yield path, f"a name here must be {expected(schema.key_type)}, found {found(key)}; put it in quotes"
            else:
                yield from self.faults(item, schema.value_type, (*path, str(key)))
        yield from _length_faults(value, schema, path)

    def _list(self, value: list[Any] | tuple[Any, ...], schema: Any, path: Path) -> Iterator[Fault]:
        for index, item in enumerate(value):
            yield from self.faults(item, item_type(schema, index), (*path, index))
        if isinstance(schema, inspect.TupleType):
            if len(value) != len(schema.item_types):
                yield path, f"expected {expected(schema)}, found {found(value)}"
        else:
            yield from _length_faults(value, schema, path)

    def _mismatch(self, value: Any, schema: inspect.Type, declared: inspect.Type, secret: bool) -> str:
        what = f"expected {expected(declared)}, found {found(value, secret=secret)}"
        if isinstance(value, str):
            allowed = [name for member in members(schema) for name in names(member)]
            if allowed and "did you mean" in (hint := nearest(value, allowed)):
                return f"{what}; {hint}"
            if self._strict and fits(value, schema, strict=False):
                return f"{what}; write it without quotes"
        elif self._strict and any(fits(text, schema, strict=True) for text in _unquoted(value)):
            return f"{what}; put it in quotes"
        return what


def fault_of_message(error: Exception) -> Fault:
    """The fault as msgspec's message has it, for types that FaultFinder does not judge."""
    if isinstance(error, UnicodeEncodeError):
        return (), "holds text that is not Unicode (a lone surrogate)"
    match = _AT.match(str(error))
    assert match is not None, "the pattern matches any text"
    steps = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", (match["path"] or "").partition("[...]")[0])
    path = tuple(name or int(index) for name, index in steps)
    return path, match["what"][:1].lower() + match["what"][1:].replace("`", "")


def _unquoted(value: Any) -> list[str]:
    """The texts that may have been meant by a scalar that YAML or TOML did not read as text."""
    if isinstance(value, bool):
        return ["true", "yes", "on"] if value else ["false", "no", "off"]
    return [found(value)] if isinstance(value, int | float | datetime.date | datetime.time) else []


def _length_faults(value: Any, schema: Any, path: Path) -> Iterator[Fault]:
    low, high = schema.min_length or 0, schema.max_length
    if len(value) < low or (high is not None and len(value) > high):
        yield path, f"expected {expected(schema)}, found {found(value)}"
