"""Turns plain data into structs, and what is wrong with it into one line that a person can act on.

msgspec decides whether the data fits. Where it does not, the data is walked beside the type to say exactly where,
what stood there and what is allowed; a field's `Meta(description="a name of …")` replaces our words for its type.
"""

from __future__ import annotations

import datetime
import functools
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeGuard, TypeVar

import msgspec
from msgspec import inspect

from flowmesh.errors import FieldError
from flowmesh.messages.wording import Path, dotted, expected, found, nearest
from flowmesh.redaction import is_secret

__all__ = ["FieldError", "convert", "nearest"]

T = TypeVar("T")

_AT = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)
_SCALARS = {inspect.BoolType: bool, inspect.IntType: int, inspect.FloatType: float, inspect.StrType: str}
_NO_MAPPINGS = (str, int, float, list, tuple, type(None), datetime.date)
_LIMITS = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern")
_LISTS = (inspect.ListType, inspect.VarTupleType, inspect.SetType, inspect.FrozenSetType, inspect.TupleType)

_REFUSALS = (msgspec.ValidationError, UnicodeEncodeError)
"""The second is what msgspec raises for text with lone surrogates, as variables in another encoding have them."""

Fault = tuple[Path, str]
"""Where, below the value that was checked, and what is wrong there."""


def convert(value: Any, into: type[T], *, where: str, strict: bool = True) -> T:
    """`value` (what a JSON, YAML or TOML decoder gives) as an `into`. NaN and infinities are no numbers here.

    Args:
        where: the dotted path of `value` in its document, for the error; empty for the top.
        strict: False also takes "3" for 3 and "true" for True.

    Raises:
        FieldError: names the path, what was found and what is allowed; for an unknown field the nearest known one.
    """
    try:
        converted = msgspec.convert(value, into, strict=strict)
    except _REFUSALS as error:
        fault = _Walk(strict).fault(value, inspect.type_info(into), ()) or _by_message(error)
    except RecursionError:
        fault = (), "nested too deep"
    else:
        schema = _with_floats(into)  # type: ignore[arg-type]  # types can be hashed
        stray = None if schema is None else _not_finite(value, schema, (), strict)
        if stray is None:
            return converted
        fault = stray
    path, what = fault
    place = dotted(where, path)
    raise FieldError(f"{place or 'the document'}: {what}", place)


class _Walk:
    """Finds the first fault of a value that msgspec refused."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict

    def fault(self, value: Any, wanted: inspect.Type, path: Path) -> Fault | None:
        """The first thing wrong with `value`, or None where all that we can judge fits."""
        schema = _choose(value, _bare(wanted))
        match schema:
            case inspect.StructType() if isinstance(value, Mapping):
                return self._struct(value, schema, path) or self._own_check(value, schema, path)
            case inspect.UnionType() if (tags := _tags(schema)) and isinstance(value, Mapping):
                return self._tag(value, tags, path)
            case inspect.DictType() if isinstance(value, Mapping):
                return self._dict(value, schema, path) or _length_fault(value, schema, path)
            case _ if isinstance(schema, _LISTS) and isinstance(value, list | tuple):
                return self._list(value, schema, path)
        fits = self._fits(value, schema)
        return None if fits is None or fits else (path, self._mismatch(value, schema, wanted, is_secret(path)))

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

    def _own_check(self, value: Any, schema: inspect.StructType, path: Path) -> Fault | None:
        """What the struct's own `__post_init__` says, which only shows once each field fits."""
        try:
            msgspec.convert(value, schema.cls, strict=self.strict)
        except msgspec.ValidationError as error:
            return (path, str(error)) if " - at `" not in str(error) else None
        except UnicodeEncodeError as error:
            return path, _by_message(error)[1]
        return None

    def _tag(self, value: Mapping[Any, Any], tags: Mapping[Any, str], path: Path) -> Fault | None:
        field = next(iter(tags.values()))
        words = f"expected one of {', '.join(sorted(map(str, tags)))}"
        if field not in value:
            return (*path, field), f"missing; {words}"
        tag = value[field]
        hint = f"; {nearest(tag, map(str, tags))}" if isinstance(tag, str) else ""
        return (*path, field), f"{words}, found {found(tag)}" + (hint if "did you mean" in hint else "")

    def _dict(self, value: Mapping[Any, Any], schema: inspect.DictType, path: Path) -> Fault | None:
        for key, item in value.items():
            if self._fits(key, _bare(schema.key_type)) is False:
                if isinstance(key, str):
                    return (*path, key), f"its name must be {expected(schema.key_type)}"
                return path, f"a name here must be {expected(schema.key_type)}, found {found(key)}; put it in quotes"
            if fault := self.fault(item, schema.value_type, (*path, str(key))):
                return fault
        return None

    def _list(self, value: list[Any] | tuple[Any, ...], schema: Any, path: Path) -> Fault | None:
        for index, item in enumerate(value):
            if fault := self.fault(item, _item(schema, index), (*path, index)):
                return fault
        if isinstance(schema, inspect.TupleType):
            wrong = len(value) != len(schema.item_types)
            return (path, f"expected {expected(schema)}, found {found(value)}") if wrong else None
        return _length_fault(value, schema, path)

    def _fits(self, value: Any, schema: inspect.Type) -> bool | None:
        """Whether msgspec takes `value` for this leaf. None: a type that is not judged here."""
        if isinstance(schema, inspect.UnionType):
            verdicts = [self._fits(value, _bare(each)) for each in schema.types]
            return True if True in verdicts else None if None in verdicts else False
        if isinstance(schema, (inspect.StructType, inspect.DictType, *_LISTS)):
            return False  # what does look like one was walked
        if (kind := _leaf(schema)) is None:
            return None
        try:
            leaf = msgspec.convert(value, kind, strict=self.strict)
        except (*_REFUSALS, RecursionError):
            return False
        return not isinstance(leaf, float) or math.isfinite(leaf)

    def _mismatch(self, value: Any, schema: inspect.Type, wanted: inspect.Type, secret: bool) -> str:
        said = f"expected {expected(wanted)}, found {found(value, secret=secret)}"
        kinds = [_bare(each) for each in (schema.types if isinstance(schema, inspect.UnionType) else (schema,))]
        if isinstance(value, str):
            names = [str(name) for kind in kinds for name in _names(kind)]
            if names and "did you mean" in (hint := nearest(value, names)):
                return f"{said}; {hint}"
            if self.strict and _Walk(strict=False)._fits(value, schema):
                return f"{said}; write it without quotes"
        elif self.strict and any(self._fits(text, schema) for text in _unquoted(value)):
            return f"{said}; put it in quotes"
        return said


def _unquoted(value: Any) -> list[str]:
    """What may have been meant by a scalar that YAML or TOML did not take for text."""
    if isinstance(value, bool):
        return ["true", "yes", "on"] if value else ["false", "no", "off"]
    return [found(value)] if isinstance(value, int | float | datetime.date | datetime.time) else []


def _bare(schema: inspect.Type) -> inspect.Type:
    while isinstance(schema, inspect.Metadata):
        schema = schema.type
    return schema


def _is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    """To ask an abstract class about a scalar takes milliseconds where large libraries have registered theirs."""
    return isinstance(value, dict) or (not isinstance(value, _NO_MAPPINGS) and isinstance(value, Mapping))


def _choose(value: Any, schema: inspect.Type) -> inspect.Type:
    """Of a union the one member that `value` has the shape of, where there is just one."""
    if not isinstance(schema, inspect.UnionType):
        return schema
    members = [_bare(each) for each in schema.types]
    shaped: list[inspect.Type]
    if _is_mapping(value):
        shaped = [each for each in members if isinstance(each, inspect.StructType | inspect.DictType)]
        tagged: list[inspect.Type] = [
            each
            for each in shaped
            if isinstance(each, inspect.StructType) and each.tag_field and value.get(each.tag_field) == each.tag
        ]
        shaped = tagged or shaped
    elif isinstance(value, list | tuple):
        shaped = [each for each in members if isinstance(each, _LISTS)]
    else:
        shaped = [each for each in members if not isinstance(each, inspect.NoneType)]
    return shaped[0] if len(shaped) == 1 and value is not None else schema


def _tags(schema: inspect.UnionType) -> dict[Any, str]:
    structs = [each for each in map(_bare, schema.types) if isinstance(each, inspect.StructType)]
    return {each.tag: each.tag_field for each in structs if each.tag_field is not None}


def _item(schema: Any, index: int) -> inspect.Type:
    if isinstance(schema, inspect.TupleType):
        return schema.item_types[index] if index < len(schema.item_types) else inspect.AnyType()
    item: inspect.Type = schema.item_type
    return item


def _names(schema: inspect.Type) -> list[Any]:
    if isinstance(schema, inspect.EnumType):
        return [member.value for member in schema.cls if isinstance(member.value, str)]
    return [each for each in schema.values if isinstance(each, str)] if isinstance(schema, inspect.LiteralType) else []


def _leaf(schema: inspect.Type) -> Any:
    """The Python type that `schema` describes, limits included, where it is a scalar."""
    if isinstance(schema, inspect.NoneType):
        return type(None)
    if isinstance(schema, inspect.EnumType):
        return schema.cls
    if isinstance(schema, inspect.LiteralType):
        return Literal[tuple(schema.values)]
    if (base := _SCALARS.get(type(schema))) is None:
        return None
    limits = {name: limit for name in _LIMITS if (limit := getattr(schema, name, None)) is not None}
    return Annotated[base, msgspec.Meta(**limits)] if limits else base


def _length_fault(value: Any, schema: Any, path: Path) -> Fault | None:
    low, high = schema.min_length or 0, schema.max_length
    if len(value) < low or (high is not None and len(value) > high):
        return path, f"expected {expected(schema)}, found {found(value)}"
    return None


def _by_message(error: Exception) -> Fault:
    """msgspec's own words, for what the walk does not judge."""
    if isinstance(error, UnicodeEncodeError):
        return (), "holds text that is not Unicode (a lone surrogate)"
    match = _AT.match(str(error))
    assert match is not None, "the pattern matches any text"
    steps = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", (match["path"] or "").partition("[...]")[0])
    path = tuple(name or int(index) for name, index in steps)
    return path, match["what"][:1].lower() + match["what"][1:].replace("`", "")


# ---- NaN and the infinities, which msgspec takes for numbers ---------------------------------------------------------


@functools.cache
def _with_floats(into: Any) -> inspect.Type | None:
    """The type's description where a float can be anywhere in it; None saves the walk over the data."""
    schema = inspect.type_info(into)
    seen: set[int] = set()
    todo: list[Any] = [schema]
    while todo:
        each = todo.pop()
        if isinstance(each, inspect.FloatType):
            return schema
        if id(each) not in seen:
            seen.add(id(each))
            todo += _children(each)
    return None


def _children(schema: Any) -> list[inspect.Type]:
    match schema:
        case inspect.StructType():
            return [field.type for field in schema.fields]
        case inspect.UnionType():
            return list(schema.types)
        case inspect.DictType():
            return [schema.value_type]
        case inspect.TupleType():
            return list(schema.item_types)
        case inspect.Metadata():
            return [schema.type]
    return [item] if (item := getattr(schema, "item_type", None)) is not None else []


def _not_finite(value: Any, wanted: inspect.Type, path: Path, strict: bool) -> Fault | None:
    """The first NaN or infinity that stands where a number is wanted."""
    schema = _choose(value, _bare(wanted))
    match schema:
        case inspect.StructType() if _is_mapping(value):
            pairs = ((field.encode_name, field.type) for field in schema.fields if field.encode_name in value)
            faults = (_not_finite(value[name], kind, (*path, name), strict) for name, kind in pairs)
        case inspect.DictType() if _is_mapping(value):
            faults = (_not_finite(item, schema.value_type, (*path, str(key)), strict) for key, item in value.items())
        case _ if isinstance(schema, _LISTS) and isinstance(value, list | tuple):
            faults = (_not_finite(x, _item(schema, i), (*path, i), strict) for i, x in enumerate(value))
        case _ if _is_float(schema) and isinstance(value, float if strict else float | str):
            fits = _Walk(strict)._fits(value, schema)
            return (path, f"expected {expected(wanted)}, found {found(value)}") if fits is False else None
        case _:
            return None
    return next((fault for fault in faults if fault is not None), None)


def _is_float(schema: inspect.Type) -> bool:
    return any(isinstance(_bare(each), inspect.FloatType) for each in getattr(schema, "types", (schema,)))
