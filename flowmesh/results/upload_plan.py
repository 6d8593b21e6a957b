"""Which files of a delivery are uploaded: archives and files that runners asked for, and `spec.output.artifacts`.

Folders are archived on the way, each once.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from flowmesh.errors import DeliveryError
from flowmesh.files.folder import Parts
from flowmesh.messages.job import ArchiveRequest, Outcome, UploadRequest
from flowmesh.messages.output import Remote, file_url
from flowmesh.results.delivery_state import DeliveryState, Made
from flowmesh.results.manifest import MANIFEST_FILE, RESPONSES_FILE
from flowmesh.results.safe_names import is_plain_name
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
            if not isinstance(folder.target.destination, Remote):
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
        archive, made = self._archive(folder, request.folder)
        name, prefix = archive[-1], f"{request.folder}_archive"
        folder.result |= {
            prefix: name,
            f"{prefix}_path": str(folder.path.joinpath(*archive)),
            f"{prefix}_bytes": made.size,
            f"{prefix}_uploaded": False,
        }
        uploaded = {f"{prefix}_url": _url(folder, name), f"{prefix}_uploaded": True}
        return item_of(folder, archive, [(folder.result, uploaded)])

    def _upload_item(self, folder: TaskFolder, request: UploadRequest, result: dict[str, Any]) -> Item:
        """A file that a runner asked to upload; `result[field]` gets its URL on arrival."""
        parts = folder.find(request.path)
        status = None if parts is None else folder.status(parts)
        if parts is None or status is None or not stat.S_ISREG(status.st_mode):
            raise DeliveryError(f"cannot upload {request.path}: there is no such file in {folder.path}")
        if not isinstance(result.get(request.field), dict):
            result[request.field] = {}
        url = _url(folder, parts[-1])
        gets = {"uploaded": True, "url": url, "download_url": url}
        if "path" in result[request.field]:  # what a later stage is given, on any node
            gets["path"] = url
        return item_of(folder, parts, [(result[request.field], gets)])

    def _artifact_item(self, folder: TaskFolder, artifact: str) -> Item | None:
        """One of `spec.output.artifacts`; None where it cannot be delivered (the manifest says why)."""
        relative = artifact.rstrip("/")
        if relative in {RESPONSES_FILE, MANIFEST_FILE}:
            return item_of(folder, (relative,), [], last=True)
        asked = Path(relative)
        archive = asked.with_name(asked.name + ARCHIVE_SUFFIX) if asked.name else asked
        if self._made(folder, str(archive)) is not None:
            return item_of(folder, self._archive(folder, relative)[0], [])
        try:
            parts = folder.top.real(relative)
            if not parts:
                self._notes.append(f"artifact {artifact} lies outside of the task's folder: it was not delivered")
                return None
            status = folder.top.status(parts)
            if stat.S_ISDIR(status.st_mode):
                return item_of(folder, self._archive(folder, relative)[0], [])
            if not stat.S_ISREG(status.st_mode):
                return None
            os.close(folder.open_file(parts))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._notes.append(f"artifact {artifact}: {error.strerror}: it was not delivered")
            return None
        return item_of(folder, parts, [], name=asked.name)

    def _made(self, folder: TaskFolder, relative: str) -> Made | None:
        """The archive of this attempt, by its path below the folder as it was asked for."""
        return self._state.archive(folder.path / relative)

    def _archive(self, folder: TaskFolder, relative: str) -> tuple[Parts, Made]:
        """`<folder>.tar.gz` beside the folder; not made again where this attempt has made it already."""
        above, _, name = relative.rstrip("/").rpartition("/")
        wrong = DeliveryError(f"cannot archive {relative}: there is no such folder in {folder.path}")
        if name in {"", ".", ".."} or relative.startswith("/"):
            raise wrong
        try:
            beside = folder.top.real(above)
        except OSError as error:
            raise DeliveryError(f"cannot archive {relative}: {error.strerror}") from error
        if beside is None:
            raise wrong
        source, archive = (*beside, name), (*beside, name + ARCHIVE_SUFFIX)
        path = folder.path.joinpath(*archive)
        made, status = self._state.archive(path), folder.status(archive)
        whole = made is not None and status is not None and status.st_size == made.size and stat.S_ISREG(status.st_mode)
        if made is not None and (whole or self._state.is_sent(_key(folder, archive[-1]))):
            return archive, made
        status = folder.status(source)
        if status is None or not stat.S_ISDIR(status.st_mode):
            raise wrong
        with self._sender.early(item_of(folder, archive, [])) as written:
            from flowmesh.results.archive import make_archive  # only a delivery's process needs tarfile

            done = make_archive(folder.top, source, archive[-1], self._settings, written)
            self._state.archive_made(path, done.size, done.sha256)
        self._notes.extend(done.notes)
        return archive, Made(done.size, done.sha256)


def item_of(
    folder: TaskFolder,
    parts: Parts,
    fields: list[tuple[dict[str, Any], dict[str, Any]]],
    *,
    name: str = "",
    last: bool = False,
) -> Item:
    name = name or parts[-1]
    if not is_plain_name(name):
        raise DeliveryError(f"{name!r} cannot be the name of an uploaded file; rename it")
    return Item(
        folder=folder,
        parts=parts,
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
    assert isinstance(destination, Remote)
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
