"""Task documents from files: YAML or JSON in, plain JSON data out; what is wrong is told with file, line and column.

Only what makes it a task document at all is checked here (a mapping with a `spec`); the rest is the node's to judge.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import msgspec
import yaml

from flowmesh.errors import FieldError, FlowMeshError
from flowmesh.messages import wire

MAX_DEPTH = 64
MAX_VALUES = 2_000_000


class DocumentError(FlowMeshError):
    """A file holds no task document."""


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A document with the id that it is submitted under."""

    source: str
    """The file it came from, as the user named it."""
    task_id: str
    document: dict[str, Any]

    @property
    def task_type(self) -> str | None:
        found = self.document["spec"].get("taskType")
        return found if isinstance(found, str) else None

    def dispatch(self, worker_id: str) -> bytes:
        """The message of docs/contract.md §1.3 that hands this task to a worker.

        Raises:
            DocumentError: it is larger than any node takes.
        """
        message = {
            "task_id": self.task_id,
            "task": self.document,
            "task_type": self.task_type,
            "assigned_worker": worker_id,
            "dispatched_at": wire.utc_now(),
            "parent_task_id": None,
        }
        data = json.dumps(message, ensure_ascii=False).encode()
        if len(data) > wire.MAX_MESSAGE_BYTES:
            raise DocumentError(
                f"{self.source}: the task takes {len(data)} bytes as a message, and a node takes at most "
                f"{wire.MAX_MESSAGE_BYTES}: put the data into a file or behind a URL"
            )
        return data


def load(source: str, task_id: str | None = None) -> Submission:
    """The task document in `source` ("-": the standard input), with `task_id` or a fresh id.

    Raises:
        DocumentError: it cannot be read, or is no YAML or JSON.
        FieldError: it is no mapping with a `spec`, or holds something that JSON has no word for.
    """
    name = "<stdin>" if source == "-" else source
    text = _read(source, name)
    data = _parse_json(text, name) if source.endswith(".json") else _parse_yaml(text, name)
    document = _Plain(name).plain(data, "", 0)
    if not isinstance(document, dict):
        raise FieldError(f"{name}: a task document is a mapping with `spec` inside, and this is {_kind(data)}", "")
    if not isinstance(document.get("spec"), dict):
        found = _kind(document["spec"]) if "spec" in document else "not there"
        raise FieldError(f"{name}: spec: must be a mapping (it is {found})", "spec")
    if task_id is not None and wire.usable_task_id(task_id) is None:
        raise FieldError(
            f"--task-id: {task_id!r} cannot be a task's id: letters, digits and . _ : @ = + -, at most 200", "task_id"
        )
    return Submission(source=name, task_id=task_id or f"task-{secrets.token_hex(8)}", document=document)


def _read(source: str, name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise DocumentError(f"{name}: cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{name}: byte {error.start} is not UTF-8: save the file as UTF-8") from None


def _parse_json(text: str, name: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            raise DocumentError(f"{name}: {twice!r} stands twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DocumentError(f"{name}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
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
            what = "a second document begins here: one file holds one task"
        raise DocumentError(f"{name}: {at}{_one_line(what)}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: `!!int x` and its like
        raise DocumentError(f"{name}: not YAML: {_one_line(str(error))}") from None
    except RecursionError:
        raise DocumentError(f"{name}: nested deeper than {MAX_DEPTH} levels") from None


class _Loader(yaml.SafeLoader):
    """YAML as authors of task files mean it: 1e-5 is a number, 2024-01-01 is text, and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands twice in one mapping", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_TIMESTAMP, _FLOAT = "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$", re.ASCII), list("-+.0123456789")
)


class _Plain:
    """Takes what YAML has and JSON has not out of a document, or says where it stands."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._values = 0

    def plain(self, value: Any, path: str, depth: int) -> Any:
        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES:
            limit = f"nested deeper than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_VALUES} values"
            raise FieldError(f"{self._name}: {path.partition('.')[0]}: {limit} (does an alias contain itself?)", path)
        match value:
            case None | bool() | int() | str():
                return value
            case float():
                if math.isfinite(value):
                    return value
                raise FieldError(f"{self._name}: {path}: {value} is no number that JSON has", path)
            case dict():
                return {
                    self._key(key, path): self.plain(each, f"{path}.{key}" if path else str(key), depth + 1)
                    for key, each in value.items()
                }
            case list():
                return [self.plain(each, f"{path}[{index}]", depth + 1) for index, each in enumerate(value)]
            case _:
                raise FieldError(f"{self._name}: {path}: {_kind(value)} has no place in a task: use text", path)

    def _key(self, key: Any, path: str) -> str:
        if isinstance(key, str):
            return key
        if isinstance(key, int) and not isinstance(key, bool):
            return str(key)
        where = f"{path}: " if path else ""
        raise FieldError(f"{self._name}: {where}the key {key!r} is {_kind(key)}: put it into quotes", path)


def _kind(value: Any) -> str:
    match value:
        case None:
            return "empty"
        case bool():
            return f"the truth value {str(value).lower()} (YAML reads on, off, yes and no as one)"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list() | tuple():
            return "a list"
        case dict():
            return "a mapping"
        case _:
            return f"a value of the kind {type(value).__name__}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
