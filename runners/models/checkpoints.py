"""`spec.checkpoint.load`: weights of an earlier run, from a path, a task of this node, or a URL, in this order."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

import msgspec

from flowmesh.validation.s3_url import is_url
from runners.api import BadRequest, Context
from runners.models.files import downloaded, existing, find_root, opened, result_url, safe_name, task_folder
from runners.models.spec import CheckpointLoad

DEFAULT_FILE = "final_model.tar.gz"
_STEP = re.compile(r"checkpoint-(\d+)")


class Loaded(msgspec.Struct, frozen=True):
    """A resolved checkpoint on this node."""

    folder: Path
    shown: str
    """Its name in the result and in errors."""
    where: str
    """The field that named it."""


def load_checkpoint(ctx: Context, load: CheckpointLoad, where: str = "spec.checkpoint.load") -> Loaded:
    """Resolve the document's checkpoint to a folder, `subdir` included. The caller checks its contents.

    Raises:
        BadRequest: no such checkpoint, or the document names none.
        RunnerError: its server is unreachable.
    """
    archive_format = load.archive_format or "auto"
    path, url = _path_and_url(load, where)
    task_id = load.taskId or load.task_id
    if load.taskId and load.task_id and load.taskId != load.task_id:
        raise BadRequest(f"{where}.task_id: differs from {where}.taskId; give one of them")
    _check_belongings(load, path=path, url=url, task_id=task_id, where=where)
    if path is None and url is None and task_id is None:
        raise BadRequest(f"{where}: needs a `path`, a `url` or a `taskId`")
    others = task_id is not None or (url is not None and load.type != "local")
    if path is not None and (there := existing(ctx, path, f"{where}.path", others=others)) is not None:
        folder = opened(ctx, there, archive_format, f"{where}.path")
        return _below(folder, load, path, f"{where}.path", where)
    id_field = f"{where}.{'taskId' if load.taskId else 'task_id'}"
    if task_id is not None:
        found = _of_task(ctx, load, task_id, archive_format, id_field)
        if found is not None:
            return _below(found, load, task_id, id_field, where)
    field, shown = f"{where}.{'url' if load.url else 'uri'}", url or ""
    if url is None and task_id is not None:
        url, field, shown = _task_url(ctx, load, task_id, where), id_field, task_id
    if url is not None and load.type != "local":
        folder = downloaded(ctx, url, archive_format, field, headers=load.headers, timeout_s=load.timeout_s)
        return _below(folder, load, shown, field, where)
    if path is not None:
        raise BadRequest(f"{where}.path: there is no {path!r} on this node")
    if load.filename is not None and task_folder(ctx, task_id or "", id_field) is not None:
        raise BadRequest(f"{where}.filename: the results of task {task_id!r} hold no {load.filename!r}")
    raise BadRequest(f"{id_field}: this node has no results of task {task_id!r}, and there is no URL to get them from")


def model_root(folder: Path, where: str) -> Path:
    """Find the model in a checkpoint: the folder itself, its `final_model`, its latest `checkpoint-N`, or deeper.

    Raises:
        BadRequest: no model found.
    """
    if (folder / "config.json").is_file():
        return folder
    if (folder / "final_model" / "config.json").is_file():
        return folder / "final_model"
    if latest := latest_step(folder):
        return latest
    return find_root(folder, "config.json", "model", where)


def latest_step(folder: Path) -> Path | None:
    """The `checkpoint-N` with the highest N in `folder` or its `checkpoints` that holds a model."""
    steps = [
        (int(match[1]), each)
        for parent in (folder, folder / "checkpoints")
        if parent.is_dir()
        for each in parent.iterdir()
        if (match := _STEP.fullmatch(each.name)) and (each / "config.json").is_file()
    ]
    return max(steps)[1] if steps else None


def _path_and_url(load: CheckpointLoad, where: str) -> tuple[str | None, str | None]:
    """Path and URL of the document; `uri` is read as one of them by its scheme."""
    path, url = load.path, load.url
    if load.uri is not None:
        if is_url(load.uri):
            name, one, other = "url", url, load.uri
            url = other
        else:
            name, one, other = "path", path, unquote(load.uri.removeprefix("file://"))
            path = other
        if one not in (None, other):
            raise BadRequest(f"{where}.uri: differs from {where}.{name}; give one of them")
    if path is not None and is_url(path):
        path, url = None, url or path
    if load.type == "http" and url is None and load.taskId is None and load.task_id is None:
        raise BadRequest(f"{where}.url: missing; type 'http' needs one, or a taskId")
    return path, url


def _check_belongings(
    load: CheckpointLoad, *, path: str | None, url: str | None, task_id: str | None, where: str
) -> None:
    """Raises BadRequest for a field that qualifies another one which is absent."""
    if load.type == "local" and path is None and task_id is None and url is not None:
        raise BadRequest(f"{where}.type: 'local', and there is only a URL; set it to 'http' or leave it out")
    far = load.type != "local" and (url is not None or task_id is not None)
    for name, value, there, needed in (
        ("filename", load.filename, task_id is not None, "`taskId`"),
        ("base_url", load.base_url, task_id is not None, "`taskId`"),
        ("headers", load.headers, far, "`url` or `taskId`"),
        ("timeoutSec", load.timeout_s, far, "`url` or `taskId`"),
    ):
        if value is not None and not there:
            raise BadRequest(f"{where}.{name}: goes with {needed}, which is not there")


def _of_task(ctx: Context, load: CheckpointLoad, task_id: str, archive_format: str, where: str) -> Path | None:
    folder = task_folder(ctx, task_id, where)
    if folder is None:
        return None
    if load.filename is None:
        return folder
    name = safe_name(load.filename, where)
    for candidate in (folder / name, folder / "artifacts" / name):
        if candidate.exists():
            return opened(ctx, candidate, archive_format, where)
    return None


def _task_url(ctx: Context, load: CheckpointLoad, task_id: str, where: str) -> str | None:
    """URL of another task's file at the orchestrator (docs/contract.md, 2)."""
    name = safe_name(load.filename or DEFAULT_FILE, f"{where}.filename")
    if load.base_url is not None:
        base = load.base_url.rstrip("/")
        root = base if base.endswith("/results") else f"{base}/api/v1/results"
        return f"{root}/{task_id}/files/{quote(name)}"
    return result_url(ctx, task_id, name)


def _below(folder: Path, load: CheckpointLoad, shown: str, field: str, where: str) -> Loaded:
    if load.subdir is None:
        return Loaded(folder, _without_query(shown), field)
    inside = PurePosixPath(load.subdir)
    target = folder / inside
    if inside.is_absolute() or ".." in inside.parts:
        raise BadRequest(f"{where}.subdir: {load.subdir!r} leads out of the checkpoint")
    if not target.is_dir():
        there = ", ".join(sorted(each.name for each in folder.iterdir() if each.is_dir())) or "none"
        raise BadRequest(f"{where}.subdir: no folder {load.subdir!r} in the checkpoint; folders: {there}")
    return Loaded(target, _without_query(shown), f"{where}.subdir")


def _without_query(shown: str) -> str:
    return shown.split("?", maxsplit=1)[0] if urlsplit(shown).scheme in ("http", "https") else shown
