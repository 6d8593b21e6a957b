"""`postprocess.jsonl_export`: the answers as a JSONL file in the task's folder, one line per item.

Missing values are found before the model runs, so that a task does not fail here after it has computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from flowmesh.messages.job import Job
from flowmesh.validation.json_paths import PathError, parse, walk
from runners.api import BadRequest, Context, TaskInput
from runners.models.spec import Section

RESERVED = frozenset({"responses.json", "manifest.json", "rows.jsonl", "rows.jsonl.gz", "logs"})
FOLDERS = frozenset({"artifacts", "checkpoints"})
"""The task's own folders; the export may be written into one."""
DEFAULT_PATH = "export.jsonl"
DEFAULT_FIELDS = {"prompt": "prompt", "output": "output"}
Getter = Callable[[Mapping[str, Any]], Any]


class Missing(LookupError):
    """An item has no such value."""


class Field(Section, frozen=True, rename={"source": "from"}):
    """One field of a record, written out."""

    source: Literal["prompt", "output", "metadata", "item", "literal"]
    key: str | None = None
    """A path into the metadata or the item; without it, all of it."""
    value: Any = None
    """Of a literal."""
    fallback: Any = None
    """Another field to take where this one has nothing, as a name or written out."""
    default: Any = msgspec.UNSET
    """What stands there where neither has anything."""


class JsonlExport(Section, frozen=True):
    """spec.postprocess.jsonl_export"""

    path: str | None = None
    fields: dict[str, Any] | None = None
    required_fields: tuple[str, ...] | None = None


class Postprocess(Section, frozen=True):
    """spec.postprocess"""

    jsonl_export: JsonlExport | None = None


class Export:
    """A checked export, which can only fail on the disk."""

    def __init__(self, ctx: TaskInput, wanted: JsonlExport, where: str) -> None:
        self._where = where
        self.relative_path = check_path(wanted.path or DEFAULT_PATH, f"{where}.path")
        fields = wanted.fields or dict(DEFAULT_FIELDS)
        self._getters = {name: _getter(ctx, field, f"{where}.fields.{name}") for name, field in fields.items()}
        self._required = wanted.required_fields or ()
        for i, name in enumerate(self._required):
            if name not in self._getters:
                known = ", ".join(self._getters)
                raise BadRequest(f"{where}.required_fields[{i}]: {name!r} is none of the fields ({known})")

    def check(self, items: list[dict[str, Any]]) -> None:
        """Raises BadRequest if an unanswered item lacks the source of a required field."""
        for item in items:
            self._record(item)

    def write(self, ctx: Context, folder: Path, items: list[dict[str, Any]], child: str | None) -> dict[str, Any]:
        """Write the file below `folder`, request its upload, and return the result's `jsonl_export`."""
        target = folder / self.relative_path
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.partial")
        scratch.write_bytes(self.lines(items))
        scratch.rename(target)
        ctx.upload(self.relative_path, "jsonl_export", child)
        return {"path": str(target), "worker_path": str(target), **self.shown(len(items))}

    def lines(self, items: Iterable[Mapping[str, Any]]) -> bytes:
        """The file's content. Raises BadRequest as `check` does."""
        return b"".join(msgspec.json.encode(self._record(item)) + b"\n" for item in items)  # not finite: null

    def shown(self, count: int) -> dict[str, Any]:
        """`jsonl_export` of the result, without the path on the node."""
        return {"relative_path": self.relative_path, "record_count": count, "fields": list(self._getters)}

    def _record(self, item: Mapping[str, Any]) -> dict[str, Any]:
        record = {}
        for name, getter in self._getters.items():
            try:
                record[name] = getter(item)
            except Missing as error:
                record[name] = None
                missing = str(error)
            else:
                missing = "its value is null"
            if record[name] is None and name in self._required:
                raise BadRequest(f"{self._where}.required_fields: item {item['index']} has no {name!r}: {missing}")
        return record


def of_finished(postprocess: dict[str, Any], items: Sequence[dict[str, Any]]) -> tuple[str, bytes, dict[str, Any]]:
    """The export of the finished items of a task that failed: its path, its content, and what the result says of it.

    Raises:
        BadRequest: the section is wrong, or an item lacks a required field.
    """
    ctx = TaskInput(Job(
        attempt=0, task_id="", task_type="inference", runner="", task={}, out_dir="", results_dir="", cache_dir="",
        tmp_dir="",
    ))  # fmt: skip
    export = read_export(ctx, {"postprocess": postprocess})
    if export is None:
        raise BadRequest("spec.postprocess: asks for no export")
    return export.relative_path, export.lines(items), export.shown(len(items))


def read_export(ctx: TaskInput, spec: dict[str, Any], where: str = "spec") -> Export | None:
    """The task's export, or None.

    Raises:
        BadRequest: naming the field.
    """
    wanted = ctx.check(spec.get("postprocess") or {}, Postprocess, f"{where}.postprocess").jsonl_export
    return None if wanted is None else Export(ctx, wanted, f"{where}.postprocess.jsonl_export")


def check_path(path: str, where: str, example: str = DEFAULT_PATH) -> str:
    """A file's path below the task's folder, as given.

    Raises:
        BadRequest: it leads elsewhere, or is one of the node's own files.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path or "\\" in path or path.endswith("/"):
        raise BadRequest(f"{where}: a path below the task's folder is needed, without `..` (found {path!r})")
    if parts[0] in RESERVED:
        raise BadRequest(f"{where}: {parts[0]!r} is the node's own; choose another name")
    if len(parts) == 1 and parts[0] in FOLDERS:
        raise BadRequest(f"{where}: {parts[0]!r} is a folder; give a file's name, such as {parts[0]}/{example}")
    return str(PurePosixPath(path))


def _getter(ctx: TaskInput, field: Any, where: str) -> Getter:
    if isinstance(field, dict):
        return _written_out(ctx, ctx.check(field, Field, where), where)
    if not isinstance(field, str):
        return lambda _item: field
    if field in ("prompt", "output", "metadata", "item"):
        return _source(field, None, where)
    source, dot, key = field.partition(".")
    if dot and source in ("metadata", "item"):
        return _source(source, key, where)
    return lambda _item: field


def _written_out(ctx: TaskInput, field: Field, where: str) -> Getter:
    if field.source == "literal":
        if field.key is not None:
            raise BadRequest(f"{where}.key: a literal has a `value` and no key")
        return lambda _item: field.value
    if field.value is not None:
        raise BadRequest(f"{where}.value: only a field from 'literal' has one")
    if field.key is not None and field.source in ("prompt", "output"):
        raise BadRequest(f"{where}.key: {field.source!r} is one text; leave the key out")
    first = _source(field.source, field.key, where)
    others = [_getter(ctx, field.fallback, f"{where}.fallback")] if field.fallback is not None else []

    def get(item: Mapping[str, Any]) -> Any:
        missing = Missing("its value is null")
        for getter in (first, *others):
            try:
                value = getter(item)
            except Missing as error:
                missing = error
                continue
            if value is not None:
                return value
        if field.default is not msgspec.UNSET:
            return field.default
        raise missing

    return get


def _source(source: str, key: str | None, where: str) -> Getter:
    try:
        steps = parse(key) if key else []
    except PathError as error:
        raise BadRequest(f"{where}: {error}") from None

    def get(item: Mapping[str, Any]) -> Any:
        try:
            if source == "item":
                return walk(dict(item), steps, "item")
            if item.get(source) is None:
                raise Missing(f"it has no {source}")
            return walk(item[source], steps, source)
        except PathError as error:
            raise Missing(str(error)) from None

    return get
