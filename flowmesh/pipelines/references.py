"""`${stage.result.path[0].x}`: finds references in a spec, and puts the values in their places.

`${…}` that names no stage is left as it is, such as a shell's `${HOME}`; `$${` stands for `${`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from flowmesh.errors import FieldError
from flowmesh.validation.describe import Path, dotted, nearest
from flowmesh.validation.json_paths import PathError, parse, walk

REFERENCE = re.compile(r"\$(?P<escape>\$)?\{(?P<expr>[^{}]*)\}")
EACH = "each"
"""In a stage with `foreach`, `${each.x}` is its value of `x`."""
_OF_A_STAGE = re.compile(r"\s*(?P<name>.+?)\.result(?![\w-])")


class Reference(NamedTuple):
    """A reference to a stage's result."""

    stage: str
    path: str
    """Below the stage's result, or below the stage where it begins with `result`."""
    expr: str
    """As it was written."""


def split(expr: str, names: Collection[str]) -> Reference | None:
    """The stage and the path of `stage.result.x`; None if it names none. Of two names that fit, the longer one wins."""
    text = expr.strip()
    fitting = [name for name in names if text == name or (text.startswith(name) and text[len(name)] in ".[")]
    if not fitting:
        return None
    stage = max(fitting, key=len)
    return Reference(stage, text[len(stage) :].removeprefix("."), text)


def fault(expr: str, names: Collection[str]) -> str:
    """What is wrong with an `expr` that names no stage; empty if it is no reference."""
    if match := _OF_A_STAGE.match(expr):
        return f"${{{expr}}}: there is no stage {match['name']!r}; {nearest(match['name'], names)} (write $${{ for ${{)"
    return ""


def syntax_fault(reference: Reference) -> str:
    """What is wrong with the path of a reference; empty: nothing."""
    try:
        parse(reference.path)
    except PathError as error:
        return f"${{{reference.expr}}}: {error}"
    return ""


def texts(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Every text in a value, with its path. The expressions of a graph template's columns are not texts."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts(item, (*path, key))
    elif isinstance(value, list) and not is_columns(path):
        for index, item in enumerate(value):
            yield from texts(item, (*path, index))


def is_columns(path: Path) -> bool:
    return path == ("data", "template", "columns")


def columns_of(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The columns of a graph template; empty where the spec has none."""
    data = spec.get("data")
    if not isinstance(data, dict) or data.get("type") != "graph_template" or not isinstance(data.get("template"), dict):
        return []
    columns = data["template"].get("columns")
    return [column for column in columns if isinstance(column, dict)] if isinstance(columns, list) else []


def stage_of_column(column: Mapping[str, Any], names: Collection[str]) -> str | None:
    """The stage whose result a column shows."""
    node, expr = column.get("node"), column.get("expr")
    if isinstance(node, str):
        return node if node in names else None
    if not isinstance(expr, str):
        return None
    text = expr.strip()
    found = split(text[2:-1] if text.startswith("${") and text.endswith("}") else text, names)
    return found.stage if found is not None else None


def replace(
    value: Any,
    resolve: Callable[[str], Any],
    path: Path = (),
    *,
    place: Callable[[Path], str] = lambda path: dotted("spec", path),
    keep_escapes: bool = False,
) -> Any:
    """A copy of `value` with each reference replaced.

    A text that is one reference becomes its value, whatever that is. Inside a text it becomes text: strings as they
    are, anything else as JSON.

    Args:
        resolve: the value of an expression; raises NotAReference for one that is none, and PathError for one that has
            no value.
        place: the path in the document, for errors.
        keep_escapes: leave `$${` as it is, for another pass.

    Raises:
        FieldError: a reference has no value.
    """

    def inner(item: Any, step: str | int) -> Any:
        return replace(item, resolve, (*path, step), place=place, keep_escapes=keep_escapes)

    if isinstance(value, str):
        try:
            return _replaced(value, resolve, keep_escapes)
        except PathError as error:
            raise FieldError(f"{place(path)}: {error}", place(path)) from None
    if isinstance(value, dict):
        return {key: inner(item, key) for key, item in value.items()}
    if isinstance(value, list) and not is_columns(path):
        return [inner(item, index) for index, item in enumerate(value)]
    return value


def _replaced(text: str, resolve: Callable[[str], Any], keep_escapes: bool) -> Any:
    whole = REFERENCE.fullmatch(text)
    if whole is not None and whole["escape"] is None:
        try:
            return resolve(whole["expr"])
        except NotAReference:
            return text

    def one(match: re.Match[str]) -> str:
        if match["escape"] is not None:
            return match[0] if keep_escapes else match[0][1:]
        try:
            return as_text(resolve(match["expr"]))
        except NotAReference:
            return match[0]

    return REFERENCE.sub(one, text)


class NotAReference(Exception):
    """An expression names no stage."""


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def value_at(reference: Reference, results: Mapping[str, Any]) -> Any:
    """The value that a reference stands for.

    Args:
        results: by stage.

    Raises:
        PathError: names stage and path, and what is there instead.
    """
    shown = f"${{{reference.expr}}}"
    if reference.stage not in results:
        raise PathError(f"{shown}: the stage {reference.stage!r} has no result: it did not run")
    result = results[reference.stage]
    short = isinstance(result, dict) and result.get("truncated") is True
    try:
        value = below(reference.stage, result, parse(reference.path))
    except PathError as error:
        raise PathError(f"{shown}: {_NOT_WHOLE}" if short else f"{shown}: {error}") from None
    if short and ((isinstance(value, dict) and "omitted" in value) or value == result):
        raise PathError(f"{shown}: {_NOT_WHOLE}")
    return value


_NOT_WHOLE = (
    "the result does not lie in Redis as a whole (it is above 1 MiB, or queue.result_ttl_s is 0 on its node), so that "
    "no other stage can use it; let the stage write or deliver a file, and use its address"
)


def below(stage: str, result: Any, steps: list[str | int]) -> Any:
    """`stage.result.x` and `stage.x` mean the same, unless the result itself has a `result`.

    Raises:
        PathError: there is no such value.
    """
    if steps[:1] == ["result"] and not (isinstance(result, dict) and "result" in result):
        return walk(result, steps[1:], f"{stage}.result")
    return walk(result, steps, stage)


def each_value(expr: str, values: Mapping[str, Any]) -> Any:
    """The value of `${each.x}`.

    Raises:
        NotAReference: it is none of `each`.
        PathError: there is no such value.
    """
    found = split(expr, (EACH,))
    if found is None:
        raise NotAReference
    try:
        return walk(dict(values), parse(found.path), EACH)
    except PathError as error:
        raise PathError(f"${{{found.expr}}}: {error}") from None
