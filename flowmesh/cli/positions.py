"""Where the fields of a document are: the line of each dotted path in a YAML, JSON or TOML text."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterator

import yaml

from flowmesh.cli.document_parser import MAX_DEPTH, yaml_nodes
from flowmesh.validation.describe import Path, dotted

MAX_POSITIONS = 200_000
"""Of a text; what comes after them has the line of its parent."""

_SPACE = re.compile(r"[ \t\r\n]*")
_JSON = json.JSONDecoder()
_TOML_NAME = r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'"""
_TOML_PATH = rf"((?:{_TOML_NAME})(?:\s*\.\s*(?:{_TOML_NAME}))*)"
_TOML_KEY = re.compile(rf"\s*{_TOML_PATH}\s*=")
_TOML_HEADER = re.compile(rf"\s*(\[\[?)\s*{_TOML_PATH}\s*\]\]?\s*(?:#.*)?")


class Positions:
    """The lines of a text's fields.

    Args:
        text: as it could be parsed.
        form: yaml, json or toml.
    """

    def __init__(self, text: str, form: str) -> None:
        walk = {"yaml": _yaml, "json": _json, "toml": _toml}[form]
        self._lines: dict[str, int] = {}
        for path, line in walk(text):
            self._lines.setdefault(dotted("", path), line)
            if len(self._lines) >= MAX_POSITIONS:
                break

    def line(self, fault: str) -> int:
        """The line of the field that a message begins with, or of the nearest block around it; from 1."""
        end = len(fault)
        while end > 0:
            if (line := self._lines.get(fault[:end])) is not None and fault[end : end + 1] in ("", ".", "[", ":", " "):
                return line
            end = max(fault.rfind(mark, 0, end) for mark in ".[: ")
        return self._lines.get("", 1)


def _yaml(text: str) -> Iterator[tuple[Path, int]]:
    root = yaml_nodes(text)
    return iter(()) if root is None else _walk(root, (), root.start_mark.line + 1)


def _walk(node: yaml.Node, path: Path, line: int) -> Iterator[tuple[Path, int]]:
    yield path, line
    if len(path) > MAX_DEPTH:
        return  # an alias that contains itself
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*path, index), item.start_mark.line + 1)
    elif isinstance(node, yaml.MappingNode):
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                yield from _walk(value, (*path, key.value), key.start_mark.line + 1)
        for value in merged:  # after the mapping's own keys, which win
            for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                yield from _walk(each, path, line)


def _json(text: str) -> Iterator[tuple[Path, int]]:
    newlines = [match.start() for match in re.finditer("\n", text)]
    found: list[tuple[Path, int]] = []
    _json_value(text, _skip(text, 0), (), found)
    return ((path, bisect.bisect_left(newlines, at) + 1) for path, at in sorted(found, key=lambda pair: pair[1]))


def _json_value(text: str, at: int, path: Path, found: list[tuple[Path, int]]) -> int:
    """Note the offsets of all values in the one at `at`, a field's at its name; returns where it ends."""
    if not path:
        found.append((path, at))
    opening = text[at]
    if opening not in "{[":
        return _JSON.raw_decode(text, at)[1]
    at = _skip(text, at + 1)
    index = 0
    while text[at] not in "}]":
        begin = at
        step: str | int = index
        if opening == "{":
            step, at = _JSON.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)
        found.append(((*path, step), begin))
        at = _skip(text, _json_value(text, at, (*path, step), found))
        if text[at] == ",":
            at = _skip(text, at + 1)
        index += 1
    return at + 1


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _toml(text: str) -> Iterator[tuple[Path, int]]:
    """Line by line: the lines of headers and of `key = value`. A list's items have the line of its key."""
    table: Path = ()
    entries: dict[Path, int] = {}
    yield (), 1
    for number, line in enumerate(text.splitlines(), 1):
        if header := _TOML_HEADER.fullmatch(line):
            table = _steps(header[2])
            if header[1] == "[[":
                entries[table] = entries.get(table, -1) + 1
                table = (*table, entries[table])
            yield table, number
        elif key := _TOML_KEY.match(line):
            yield (*table, *_steps(key[1])), number


def _steps(key: str) -> Path:
    return tuple(step.strip("\"'") for step in re.findall(_TOML_NAME, key))
