"""Questions about msgspec's type descriptions, for walking data and its type side by side."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeGuard

import msgspec
from msgspec import inspect

LISTS = (inspect.ListType, inspect.VarTupleType, inspect.SetType, inspect.FrozenSetType, inspect.TupleType)
REFUSALS = (msgspec.ValidationError, UnicodeEncodeError)
"""What msgspec raises for data that does not fit; the second for text with lone surrogates, such as an environment
variable that is not UTF-8."""

_SCALARS = {inspect.BoolType: bool, inspect.IntType: int, inspect.FloatType: float, inspect.StrType: str}
_NO_MAPPINGS = (str, int, float, list, tuple, type(None), datetime.date)
_LIMITS = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern")


def bare(schema: inspect.Type) -> inspect.Type:
    """The type without its `Meta`."""
    while isinstance(schema, inspect.Metadata):
        schema = schema.type
    return schema


def is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    """The same as isinstance(value, Mapping), which takes milliseconds for a scalar once large libraries are loaded."""
    return isinstance(value, dict) or (not isinstance(value, _NO_MAPPINGS) and isinstance(value, Mapping))


def choose(value: Any, schema: inspect.Type) -> inspect.Type:
    """The member of a union that has the shape of `value`, where there is exactly one; else the schema itself."""
    if not isinstance(schema, inspect.UnionType):
        return schema
    members = [bare(member) for member in schema.types]
    shaped: list[inspect.Type]
    if is_mapping(value):
        shaped = [member for member in members if isinstance(member, inspect.StructType | inspect.DictType)]
        tagged: list[inspect.Type] = [
            member
            for member in shaped
            if isinstance(member, inspect.StructType) and member.tag_field and value.get(member.tag_field) == member.tag
        ]
        shaped = tagged or shaped
    elif isinstance(value, list | tuple):
        shaped = [member for member in members if isinstance(member, LISTS)]
    else:
        shaped = [member for member in members if not isinstance(member, inspect.NoneType)]
    return shaped[0] if len(shaped) == 1 and value is not None else schema


def tags(schema: inspect.UnionType) -> dict[Any, str]:
    """By tag: the field that holds it, of the union's tagged structs."""
    structs = [member for member in map(bare, schema.types) if isinstance(member, inspect.StructType)]
    return {struct.tag: struct.tag_field for struct in structs if struct.tag_field is not None}


def item_type(schema: Any, index: int) -> inspect.Type:
    """The type of the item at `index` of one of LISTS."""
    if isinstance(schema, inspect.TupleType):
        return schema.item_types[index] if index < len(schema.item_types) else inspect.AnyType()
    item: inspect.Type = schema.item_type
    return item


def inner_types(schema: Any) -> list[inspect.Type]:
    """The types that this one is made of."""
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


def members(schema: inspect.Type) -> list[inspect.Type]:
    """The alternatives of a union, or the type alone; without `Meta`."""
    return [bare(member) for member in (schema.types if isinstance(schema, inspect.UnionType) else (schema,))]


def names(schema: inspect.Type) -> list[str]:
    """The texts that an enum or a literal allows."""
    if isinstance(schema, inspect.EnumType):
        return [member.value for member in schema.cls if isinstance(member.value, str)]
    values = schema.values if isinstance(schema, inspect.LiteralType) else ()
    return [value for value in values if isinstance(value, str)]


def fits(value: Any, schema: inspect.Type, *, strict: bool) -> bool | None:
    """Whether msgspec accepts `value` for a scalar type, NaN and infinity excepted. None: a type not judged here."""
    if isinstance(schema, inspect.UnionType):
        verdicts = [fits(value, member, strict=strict) for member in members(schema)]
        return True if True in verdicts else None if None in verdicts else False
    if isinstance(schema, (inspect.StructType, inspect.DictType, *LISTS)):
        return False  # data of that shape is walked, not judged as a whole
    if (kind := _python_type(schema)) is None:
        return None
    try:
        leaf = msgspec.convert(value, kind, strict=strict)
    except (*REFUSALS, RecursionError):
        return False
    return not isinstance(leaf, float) or math.isfinite(leaf)


def _python_type(schema: inspect.Type) -> Any:
    """The Python type that describes a scalar, with its limits; None for all else."""
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


def holds(schema: inspect.Type, kind: type[inspect.Type]) -> bool:
    """Whether a type of this kind is anywhere in a schema."""
    seen: set[int] = set()
    todo: list[inspect.Type] = [schema]
    while todo:
        inner = todo.pop()
        if isinstance(inner, kind):
            return True
        if id(inner) not in seen:
            seen.add(id(inner))
            todo += inner_types(inner)
    return False
