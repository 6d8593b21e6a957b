"""Finds the first fault in data that does not fit its type: where it is, what was found there, and what is allowed."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
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

    def fault(self, value: Any, declared: inspect.Type, path: Path) -> Fault | None:
        """The first fault of `value`, which is at `path`; None where nothing that can be judged here is wrong."""
        schema = choose(value, bare(declared))
        match schema:
            case inspect.StructType() if isinstance(value, Mapping):
                return self._struct(value, schema, path) or self._post_init(value, schema, path)
            case inspect.UnionType() if (tagged := tags(schema)) and isinstance(value, Mapping):
                return self._tag(value, tagged, path)
            case inspect.DictType() if isinstance(value, Mapping):
                return self._dict(value, schema, path) or _length_fault(value, schema, path)
            case _ if isinstance(schema, LISTS) and isinstance(value, list | tuple):
                return self._list(value, schema, path)
        fit = fits(value, schema, strict=self._strict)
        return None if fit is None or fit else (path, self._mismatch(value, schema, declared, is_secret(path)))

    def _struct(self, value: Mapping[Any, Any], schema: inspect.StructType, path: Path) -> Fault | None:
        fields = {field.encode_name: field for field in schema.fields}
        for name, item in value.items():
            if not isinstance(name, str):
                return path, f"a field's name must be text, found {found(name)}; put it in quotes"
            if name in fields:
                if fault := self.fault(item, fields[name].type, (*path, name)):
                    return fault
            elif name == schema.tag_field:
                if item != schema.tag:
                    return self._tag(value, {schema.tag: schema.tag_field}, path)
            elif schema.forbid_unknown_fields:
                return (*path, name), f"unknown field; {nearest(name, fields)}"
        missing = [name for name, field in fields.items() if field.required and name not in value]
        return ((*path, missing[0]), "missing; it is required") if missing else None

    def _post_init(self, value: Any, schema: inspect.StructType, path: Path) -> Fault | None:
        """What the struct's `__post_init__` refuses, which shows only once every field fits."""
        try:
            msgspec.convert(value, schema.cls, strict=self._strict)
        except msgspec.ValidationError as error:
            return (path, str(error)) if " - at `" not in str(error) else None
        except UnicodeEncodeError as error:
            return path, fault_of_message(error)[1]
        return None

    def _tag(self, value: Mapping[Any, Any], tagged: Mapping[Any, str], path: Path) -> Fault | None:
        field = next(iter(tagged.values()))
        allowed = f"expected one of {', '.join(sorted(map(str, tagged)))}"
        if field not in value:
            return (*path, field), f"missing; {allowed}"
        tag = value[field]
        hint = f"; {nearest(tag, map(str, tagged))}" if isinstance(tag, str) else ""
        return (*path, field), f"{allowed}, found {found(tag)}" + (hint if "did you mean" in hint else "")

    def _dict(self, value: Mapping[Any, Any], schema: inspect.DictType, path: Path) -> Fault | None:
        for key, item in value.items():
            if fits(key, bare(schema.key_type), strict=self._strict) is False:
                if isinstance(key, str):
                    return (*path, key), f"its name must be {expected(schema.key_type)}"
                return path, f"a name here must be {expected(schema.key_type)}, found {found(key)}; put it in quotes"
            if fault := self.fault(item, schema.value_type, (*path, str(key))):
                return fault
        return None

    def _list(self, value: list[Any] | tuple[Any, ...], schema: Any, path: Path) -> Fault | None:
        for index, item in enumerate(value):
            if fault := self.fault(item, item_type(schema, index), (*path, index)):
                return fault
        if isinstance(schema, inspect.TupleType):
            wrong = len(value) != len(schema.item_types)
            return (path, f"expected {expected(schema)}, found {found(value)}") if wrong else None
        return _length_fault(value, schema, path)

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


def _length_fault(value: Any, schema: Any, path: Path) -> Fault | None:
    low, high = schema.min_length or 0, schema.max_length
    if len(value) < low or (high is not None and len(value) > high):
        return path, f"expected {expected(schema)}, found {found(value)}"
    return None
