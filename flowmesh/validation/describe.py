"""Describes values, paths and expected types for error messages: on one line, in plain words, without secrets."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import inspect

from flowmesh.redaction import redact_url

Step = str | int
Path = tuple[Step, ...]

_BARE = re.compile(r"[A-Za-z0-9_$-]+", re.ASCII)
_SHOWN = 80
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def near(word: str, known: Iterable[str], cutoff: float = 0.85) -> str | None:
    """The name in `known` of which `word` is probably a misspelling. Ignores case, `_` and `-`."""
    import difflib  # only unknown fields need it

    folded = {_fold(name): name for name in sorted(known)}
    match = difflib.get_close_matches(_fold(word[:200]), folded, n=1, cutoff=cutoff)
    return folded[match[0]] if match else None


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error: the name in `known` that was probably meant, else all of them. Ignores case, `_` and `-`."""
    names = sorted(known)
    if not names:
        return "nothing is allowed here"
    if meant := near(word, names, cutoff=0.6):
        return f"did you mean {meant!r}?"
    return "known: " + ", ".join(names)


def _fold(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")


def quoted(text: str, limit: int | None = _SHOWN) -> str:
    """`text` in double quotes on one line, cut to `limit` characters, with unprintable characters escaped."""
    cut = text if limit is None or len(text) <= limit else text[:limit] + "…"
    return '"' + "".join(map(_escaped, cut)) + '"'


def _escaped(c: str) -> str:
    if c in '"\\':
        return "\\" + c
    if c.isprintable():
        return c
    # Escaped as TOML does it.
    return _ESCAPES.get(c) or (f"\\u{ord(c):04x}" if ord(c) <= 0xFFFF else f"\\U{ord(c):08x}")


def dotted(where: str, path: Path) -> str:
    """`path` below `where`, as the document's author would write it: `a.b[0]."odd name"`."""
    text = where
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            name = step if _BARE.fullmatch(step) and len(step) <= _SHOWN else quoted(step)
            text = f"{text}.{name}" if text else name
    return text


def found(value: Any, *, secret: bool = False) -> str:
    """`value` for the end of an error; only its kind if it is a `secret`."""
    match value:
        case None:
            return "null"
        case str():
            text = value if "://" not in value else redact_url(value)
            return "text (not shown)" if secret else quoted(text)
        case bool():
            return "true or false" if secret else str(value).lower()
        case int() | float():
            return "a number" if secret else _number(value)
        case Mapping():
            return f"a mapping of {_count(value, 'field')}" if value else "an empty mapping"
        case list() | tuple() | set() | frozenset():
            return f"a list of {_count(value, 'item')}" if value else "an empty list"
        case datetime.date() | datetime.time():
            return "a date or time" if secret else value.isoformat()
    return f"a {type(value).__name__}"


def _count(value: Sequence[Any] | Mapping[Any, Any] | set[Any] | frozenset[Any], noun: str) -> str:
    return f"{len(value)} {noun}{'' if len(value) == 1 else 's'}"


def _number(value: float) -> str:
    if isinstance(value, int):
        # Python refuses to write out integers of more than 4300 digits.
        return str(value) if value.bit_length() <= 128 else "a huge number"
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "infinity" if value > 0 else "-infinity"


def expected(schema: inspect.Type) -> str:
    """What `schema` allows, for the middle of an error. `Meta(description=…)` replaces the generated text."""
    match schema:
        case inspect.Metadata():
            return str((schema.extra_json_schema or {}).get("description") or expected(schema.type))
        case inspect.UnionType():
            words = [expected(member) for member in schema.types if not isinstance(member, inspect.NoneType)]
            return " or ".join(dict.fromkeys(words))
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return f"a whole number{_bounds(schema)}"
        case inspect.FloatType():
            return f"a number{_bounds(schema)}"
        case inspect.StrType():
            pattern = f" matching {schema.pattern}" if schema.pattern else ""
            return f"text{_lengths(schema, 'character')}{pattern}"
        case inspect.EnumType():
            return _one_of([member.value for member in schema.cls])
        case inspect.LiteralType():
            return _one_of(schema.values)
        case inspect.TupleType():
            return f"a list of {_count(schema.item_types, 'item')}"
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType() | inspect.FrozenSetType():
            return f"a list{_lengths(schema, 'item')}"
        case inspect.DictType():
            return f"a mapping{_lengths(schema, 'field')}"
        case inspect.StructType():
            return "a mapping"
        case inspect.NoneType():
            return "null"
    return f"a {type(schema).__name__.removesuffix('Type').lower()}"


def _one_of(values: Iterable[Any]) -> str:
    words = [str(value) for value in values]
    return f"one of {', '.join(words)}" if len(words) != 1 else words[0]


def _bounds(schema: inspect.IntType | inspect.FloatType) -> str:
    if schema.ge is not None and schema.le is not None:
        return f" from {_plain(schema.ge)} to {_plain(schema.le)}"
    signs = ((">", schema.gt), (">=", schema.ge), ("<", schema.lt), ("<=", schema.le))
    limits = [f"{sign} {_plain(limit)}" for sign, limit in signs if limit is not None]
    multiple = f", a multiple of {_plain(schema.multiple_of)}" if schema.multiple_of is not None else ""
    return (" " + " and ".join(limits) if limits else "") + multiple


def _plain(number: float) -> str:
    return str(int(number)) if math.isfinite(number) and number == int(number) else str(number)


def _lengths(schema: Any, noun: str) -> str:
    low, high = schema.min_length, schema.max_length
    if low == 1 and high is None:
        return " that is not empty"
    if low and high is not None:
        return f" of {low} to {high} {noun}s"
    if low:
        return f" of at least {low} {noun}s"
    return f" of at most {high} {noun}s" if high is not None else ""
