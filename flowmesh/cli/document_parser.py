"""Parses the text of a task document: YAML or JSON in, plain JSON data out. Errors name the line and the column."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from flowmesh.errors import FieldError, FlowMeshError
from flowmesh.validation.convert import joined

MAX_DEPTH = 64
MAX_VALUES = 2_000_000


class DocumentError(FlowMeshError):
    """A file is not a task document.

    Args:
        line: where it shows, counted from 1; None: nowhere in particular.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def parse(text: str, name: str, *, as_json: bool) -> Any:
    """Parse a document to plain JSON data.

    Args:
        name: of the file, for errors.

    Raises:
        DocumentError: the text is neither YAML nor JSON.
        FieldError: it contains values that JSON cannot represent; names all of them.
    """
    data, faults = parse_all(text, name, as_json=as_json)
    if faults:
        texts = tuple(f"{name}: {fault}" for _, fault in faults)
        raise FieldError(joined(texts), faults[0][0], texts)
    return data


def parse_all(text: str, name: str, *, as_json: bool) -> tuple[Any, list[tuple[str, str]]]:
    """As `parse`, but returns the data with null for each value that JSON cannot represent, and its path and fault.

    Raises:
        DocumentError: the text is neither YAML nor JSON.
        FieldError: it is nested too deep or has too many values.
    """
    plain = _Plain(name)
    data = plain.plain(_parse_json(text, name) if as_json else _parse_yaml(text, name), "", 0)
    return data, plain.faults


def _parse_json(text: str, name: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            raise DocumentError(f"{name}: duplicate key {twice!r} in one object; remove one")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise DocumentError(f"{name}: {at}: not JSON: {error.msg}", error.lineno) from None
    except RecursionError:
        raise DocumentError(f"{name}: nested deeper than {MAX_DEPTH} levels") from None


def _parse_yaml(text: str, name: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        what = error.problem or error.context or "cannot be parsed"
        if isinstance(error, yaml.composer.ComposerError) and "single document" in (error.context or ""):
            what = "a second document begins here; put each task into a file of its own"
        line = mark.line + 1 if mark is not None else None
        raise DocumentError(f"{name}: {at}{_one_line(what)}", line) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: `!!int x` and its like
        raise DocumentError(f"{name}: not YAML: {_one_line(str(error))}") from None
    except RecursionError:
        raise DocumentError(f"{name}: nested deeper than {MAX_DEPTH} levels") from None


class _Loader(yaml.SafeLoader):
    """YAML as authors of task files mean it: 1e-5 is a number; 2024-01-01, 12:30:00 and 00123 are text, as dates, times
    and codes are; duplicate keys are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key.value!r} in one mapping; remove one", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_TIMESTAMP, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("timestamp", "int", "float"))
_NUMBERS = {
    _INT: re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$", re.ASCII),
    _FLOAT: re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN))$",
        re.ASCII,
    ),
}
"""As PyYAML has them, but for base 60 (12:30:00 would be 45000) and numbers with leading zeros (00123 would be 83)."""
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$", re.ASCII), list("-+.0123456789")
)


def yaml_nodes(text: str) -> yaml.Node | None:
    """The nodes of a YAML text that could be parsed, each with its line; None of an empty one."""
    node: yaml.Node | None = yaml.compose(text, _Loader)
    return node


class _Plain:
    """Converts YAML data to JSON data; a value that JSON cannot represent is a fault with its path."""

    def __init__(self, name: str) -> None:
        self.faults: list[tuple[str, str]] = []
        self._name = name
        self._values = 0

    def plain(self, value: Any, path: str, depth: int) -> Any:
        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES:
            limit = f"nested deeper than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_VALUES} values"
            raise FieldError(f"{self._name}: {path.partition('.')[0]}: {limit} (does an alias contain itself?)", path)
        match value:
            case None | bool() | int():
                return value
            case str():
                return value if value.isascii() else self._text(value, path)
            case float():
                if math.isfinite(value):
                    return value
                self.faults.append((path, f"{path}: {value} is not a JSON number; write a finite one"))
                return None
            case dict():
                return {
                    self._key(key, path): self.plain(item, f"{path}.{key}" if path else str(key), depth + 1)
                    for key, item in value.items()
                }
            case list():
                return [self.plain(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
            case _:
                self.faults.append((path, f"{path}: {kind(value)} is not allowed in a task; use text"))
                return None

    def _text(self, value: str, path: str) -> str:
        """The text with whole characters: JSON writes one in two halves (\\ud83d\\ude00), which YAML leaves apart."""
        try:
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.faults.append((path, f"{path}: half a character (\\ud800 to \\udfff without its other half)"))
            return ""

    def _key(self, key: Any, path: str) -> str:
        if isinstance(key, str):
            return key if key.isascii() else self._text(key, path)
        if isinstance(key, int) and not isinstance(key, bool):
            return str(key)
        where = f"{path}: " if path else ""
        self.faults.append((path, f"{where}the key {key!r} is {kind(key)}; put it in quotes"))
        return str(key)


def kind(value: Any) -> str:
    match value:
        case None:
            return "empty"
        case bool():
            return f"the boolean {str(value).lower()} (YAML also reads on, off, yes and no as booleans)"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list() | tuple():
            return "a list"
        case dict():
            return "a mapping"
        case _:
            return f"a value of type {type(value).__name__}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
