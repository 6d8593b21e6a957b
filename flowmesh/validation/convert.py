"""Converts plain data to structs, and turns all that does not fit into a one-line error with fields and remedies.

msgspec decides whether the data fits. Where it does not, the data is walked beside the type to name each exact place,
the value found and the values allowed. `Meta(description="a name of …")` replaces the generated text for a type.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
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
    holds,
    is_mapping,
    item_type,
    members,
)
from flowmesh.validation.unused import without_unused

__all__ = ["FieldError", "convert", "joined", "nearest"]

T = TypeVar("T")


MAX_FAULTS = 20
"""Of a document; an error does not list more."""


def convert(value: Any, into: type[T], *, where: str, strict: bool = True, unused: list[str] | None = None) -> T:
    """Convert `value`, as a JSON, YAML or TOML decoder gives it, to an `into`. NaN and infinity are refused.

    Args:
        where: the dotted path of `value` in its document, for the error; empty for the top.
        strict: False also takes "3" for 3 and "true" for True.
        unused: for a task's document: gets the paths of fields that are accepted without effect (`unused.py`). None:
            every unknown field is refused.

    Raises:
        FieldError: names each path, what was found and what is allowed; for an unknown field the nearest known one.
    """
    try:
        converted = msgspec.convert(value, into, strict=strict)
    except REFUSALS as error:
        if unused is not None:
            rest, without_effect = without_unused(value, _schema(into), where)  # type: ignore[arg-type]  # types can be hashed
            unused += without_effect
            if without_effect:
                return convert(rest, into, where=where, strict=strict)
        raise _refusal(_faults(value, into, error, strict), where) from None
    except RecursionError:
        raise _refusal([((), "nested too deep")], where) from None
    if (schema := _schema_with_floats(into)) is not None and (  # type: ignore[arg-type]  # types can be hashed
        faults := list(itertools.islice(_not_finite(value, schema, (), strict), MAX_FAULTS))
    ):
        raise _refusal(faults, where)
    return converted


def joined(faults: Sequence[str]) -> str:
    """All that is wrong with a document, on one line."""
    ended = [fault if fault.endswith(("?", ".", "!")) else f"{fault}." for fault in faults[:-1]]
    return " Also ".join([*ended, *faults[-1:]])


def _faults(value: Any, into: Any, error: Exception, strict: bool) -> list[Fault]:
    schema = _schema(into)
    try:
        found = FaultFinder(strict=strict).faults(value, schema, ())
        return list(itertools.islice(found, MAX_FAULTS)) or [fault_of_message(error)]
    except RecursionError:
        return [((), "nested too deep")]


def _refusal(faults: list[Fault], where: str) -> FieldError:
    places = [dotted(where, path) for path, _ in faults]
    texts = tuple(f"{place or 'the document'}: {what}" for place, (_, what) in zip(places, faults, strict=True))
    return FieldError(joined(texts), places[0], texts)


@functools.cache
def _schema(into: Any) -> inspect.Type:
    """The type's description."""
    return inspect.type_info(into)


@functools.cache
def _schema_with_floats(into: Any) -> inspect.Type | None:
    """The type's description where it contains a float anywhere; None saves the walk over the data."""
    schema = inspect.type_info(into)
    return schema if holds(schema, inspect.FloatType) else None


def _not_finite(value: Any, declared: inspect.Type, path: Path, strict: bool) -> Iterator[Fault]:
    """Every NaN or infinity in the place of a number; msgspec accepts both."""
    schema = choose(value, bare(declared))
    match schema:
        case inspect.StructType() if is_mapping(value):
            for field in schema.fields:
                if field.encode_name in value:
                    yield from _not_finite(value[field.encode_name], field.type, (*path, field.encode_name), strict)
        case inspect.DictType() if is_mapping(value):
            for key, item in value.items():
                yield from _not_finite(item, schema.value_type, (*path, str(key)), strict)
        case _ if isinstance(schema, LISTS) and isinstance(value, list | tuple):
            for i, item in enumerate(value):
                yield from _not_finite(item, item_type(schema, i), (*path, i), strict)
        case _ if _allows_float(schema) and isinstance(value, float if strict else float | str):
            if fits(value, schema, strict=strict) is False:
                yield path, f"expected {expected(declared)}, found {found(value)}"


def _allows_float(schema: inspect.Type) -> bool:
    return any(isinstance(member, inspect.FloatType) for member in members(schema))
