"""Which files of a delivery are uploaded: archives and files that runners asked for, and `spec.output.artifacts`.

Folders are archived on the way, each once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowmesh.errors import DeliveryError
from flowmesh.messages.job import ArchiveRequest, Outcome, UploadRequest
from flowmesh.messages.output import HttpDestination, file_url
from flowmesh.results.archive import make_archive
from flowmesh.results.delivery_state import DeliveryState
from flowmesh.results.manifest import MANIFEST_FILE, RESPONSES_FILE
from flowmesh.results.safe_names import is_plain_name, within
from flowmesh.results.sender import Item, Sender
from flowmesh.results.task_folder import TaskFolder
from flowmesh.settings.schema import ArchiveSettings

ARCHIVE_SUFFIX = ".tar.gz"


class UploadPlan:
    """Makes the items of one delivery.

    Args:
        notes: gets a line for each archive that was made differently than configured, and for each artifact that
            cannot be delivered.

    Raises (from its methods):
        DeliveryError: a file or folder is missing or cannot be archived, or two files have one name.
    """

    def __init__(self, archive: ArchiveSettings, state: DeliveryState, sender: Sender, notes: list[str]) -> None:
        self._settings = archive
        self._state = state
        self._sender = sender
        self._notes = notes

    def items(self, task: TaskFolder, children: list[TaskFolder], outcome: Outcome) -> list[Item]:
        """Everything that is to be uploaded, folders archived; a large archive is uploaded while it is written."""
        items: list[Item] = []
        for folder in (task, *children):
            if not isinstance(folder.target.destination, HttpDestination):
                continue
            if folder is task:
                items += (self._archive_item(folder, request) for request in outcome.archives)
            child = None if folder is task else folder.task_id
            result = task.result if child is None else _child_part(task.result, child)
            items += (self._upload_item(folder, upload, result) for upload in outcome.uploads if upload.child == child)
            artifacts = (self._artifact_item(folder, path) for path in folder.target.artifacts)
            items += (item for item in artifacts if item is not None)
        return _once(items)

    def _archive_item(self, folder: TaskFolder, request: ArchiveRequest) -> Item:
        """The archive that a runner asked for. Its fields enter the result now, `_url` and `_uploaded` on arrival."""
        archive = self._archive(folder, request.folder)
        made = self._state.archive(archive)
        assert made is not None
        prefix = f"{request.folder}_archive"
        folder.result |= {
            prefix: archive.name,
            f"{prefix}_path": str(archive),
            f"{prefix}_bytes": made.size,
            f"{prefix}_uploaded": False,
        }
        uploaded = {f"{prefix}_url": _url(folder, archive.name), f"{prefix}_uploaded": True}
        return item_of(folder, archive, [(folder.result, uploaded)])

    def _upload_item(self, folder: TaskFolder, request: UploadRequest, result: dict[str, Any]) -> Item:
        """A file that a runner asked to upload; `result[field]` gets its URL on arrival."""
        path = within(folder.path / request.path, folder.path)
        if path is None or not path.is_file():
            raise DeliveryError(f"cannot upload {request.path}: there is no such file in {folder.path}")
        if not isinstance(result.get(request.field), dict):
            result[request.field] = {}
        url = _url(folder, path.name)
        gets = {"uploaded": True, "url": url, "download_url": url}
        if "path" in result[request.field]:  # what a later stage is given, on any node
            gets["path"] = url
        return item_of(folder, path, [(result[request.field], gets)])

    def _artifact_item(self, folder: TaskFolder, artifact: str) -> Item | None:
        """One of `spec.output.artifacts`; None where it does not exist (the manifest lists it as missing)."""
        relative = artifact.rstrip("/")
        asked = folder.path / relative
        path = within(asked, folder.path)
        if relative in {RESPONSES_FILE, MANIFEST_FILE}:
            return item_of(folder, asked, [], last=True)
        archive = asked.with_name(asked.name + ARCHIVE_SUFFIX)
        if path is None or path == folder.path:
            self._notes.append(f"artifact {artifact} lies outside of the task's folder: it was not delivered")
            return None
        if path.is_dir() or self._state.archive(archive) is not None:
            return item_of(folder, self._archive(folder, relative), [])
        return item_of(folder, path, [], name=asked.name) if path.is_file() else None

    def _archive(self, folder: TaskFolder, relative: str) -> Path:
        """`<folder>.tar.gz` beside the folder; not made again where this attempt has made it already."""
        source = folder.path / relative
        archive = source.with_name(source.name + ARCHIVE_SUFFIX)
        made = self._state.archive(archive)
        whole = made is not None and archive.is_file() and archive.stat().st_size == made.size
        cleaned_up = made is not None and self._state.is_sent(_key(folder, archive.name))
        if whole or cleaned_up:
            return archive
        if within(source, folder.path) in {None, folder.path} or not source.is_dir():
            raise DeliveryError(f"cannot archive {relative}: there is no such folder in {folder.path}")
        with self._sender.early(item_of(folder, archive, [])) as written:
            done = make_archive(source, archive, self._settings, written)
            self._state.archive_made(archive, done.size, done.sha256)
        self._notes.extend(done.notes)
        return archive


def item_of(
    folder: TaskFolder,
    path: Path,
    fields: list[tuple[dict[str, Any], dict[str, Any]]],
    *,
    name: str = "",
    last: bool = False,
) -> Item:
    name = name or path.name
    if not is_plain_name(name):
        raise DeliveryError(f"{name!r} cannot be the name of an uploaded file; rename it")
    return Item(
        target=folder.target,
        path=path,
        name=name,
        key=_key(folder, name),
        url=_url(folder, name),
        fields=fields,
        last=last,
    )


def _key(folder: TaskFolder, name: str) -> str:
    return f"{folder.task_id}/{name}"


def _url(folder: TaskFolder, name: str) -> str:
    destination = folder.target.destination
    assert isinstance(destination, HttpDestination)
    assert destination.url is not None
    return file_url(destination.url, folder.task_id, name)


def _child_part(result: dict[str, Any], child: str) -> dict[str, Any]:
    children = result.get("children")
    part = children.get(child) if isinstance(children, dict) else None
    return part if isinstance(part, dict) else {}


def _once(items: list[Item]) -> list[Item]:
    """Each file once, however often it was asked for. Two files of one name would overwrite each other."""
    by_key: dict[str, Item] = {}
    for item in items:
        first = by_key.setdefault(item.key, item)
        if first.path != item.path:
            raise DeliveryError(f"{first.path} and {item.path} would both be uploaded as {item.name!r}; rename one")
        if first is not item:
            first.fields += item.fields
    return list(by_key.values())
