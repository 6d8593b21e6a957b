"""Converts plain data to structs, and turns what does not fit into a one-line error with field and remedy.

msgspec decides whether the data fits. Where it does not, the data is walked beside the type to name the exact place,
the value found and the values allowed. `Meta(description="a name of …")` replaces the generated text for a type.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from flowmesh.errors import FieldError
from flowmesh.validation.describe import Path, dotted, expected, found, nearest
from flowmesh.validation.faults import Fault, FaultFinder, fault_of_message
from flowmesh.validation.schemas import (
    LISTS,
    REFUSALS,
    bare,
    choose,
    fits,
    inner_types,
    is_mapping,
    item_type,
    members,
)

__all__ = ["FieldError", "convert", "nearest"]

T = TypeVar("T")


def convert(value: Any, into: type[T], *, where: str, strict: bool = True) -> T:
    """Convert `value`, as a JSON, YAML or TOML decoder gives it, to an `into`. NaN and infinity are refused.

    Args:
        where: the dotted path of `value` in its document, for the error; empty for the top.
        strict: False also takes "3" for 3 and "true" for True.

    Raises:
        FieldError: names the path, what was found and what is allowed; for an unknown field the nearest known one.
    """
    try:
        converted = msgspec.convert(value, into, strict=strict)
    except REFUSALS as error:
        fault = FaultFinder(strict=strict).fault(value, inspect.type_info(into), ()) or fault_of_message(error)
    except RecursionError:
        fault = (), "nested too deep"
    else:
        schema = _schema_with_floats(into)  # type: ignore[arg-type]  # types can be hashed
        not_finite = None if schema is None else _not_finite(value, schema, (), strict)
        if not_finite is None:
            return converted
        fault = not_finite
    path, what = fault
    place = dotted(where, path)
    raise FieldError(f"{place or 'the document'}: {what}", place)


@functools.cache
def _schema_with_floats(into: Any) -> inspect.Type | None:
    """The type's description where it contains a float anywhere; None saves the walk over the data."""
    schema = inspect.type_info(into)
    seen: set[int] = set()
    todo: list[Any] = [schema]
    while todo:
        inner = todo.pop()
        if isinstance(inner, inspect.FloatType):
            return schema
        if id(inner) not in seen:
            seen.add(id(inner))
            todo += inner_types(inner)
    return None


def _not_finite(value: Any, declared: inspect.Type, path: Path, strict: bool) -> Fault | None:
    """The first NaN or infinity in the place of a number; msgspec accepts both."""
    schema = choose(value, bare(declared))
    match schema:
        case inspect.StructType() if is_mapping(value):
            pairs = ((field.encode_name, field.type) for field in schema.fields if field.encode_name in value)
            faults = (_not_finite(value[name], kind, (*path, name), strict) for name, kind in pairs)
        case inspect.DictType() if is_mapping(value):
            faults = (_not_finite(item, schema.value_type, (*path, str(key)), strict) for key, item in value.items())
        case _ if isinstance(schema, LISTS) and isinstance(value, list | tuple):
            faults = (_not_finite(item, item_type(schema, i), (*path, i), strict) for i, item in enumerate(value))
        case _ if _allows_float(schema) and isinstance(value, float if strict else float | str):
            wrong = fits(value, schema, strict=strict) is False
            return (path, f"expected {expected(declared)}, found {found(value)}") if wrong else None
        case _:
            return None
    return next((fault for fault in faults if fault is not None), None)


def _allows_float(schema: inspect.Type) -> bool:
    return any(isinstance(member, inspect.FloatType) for member in members(schema))
