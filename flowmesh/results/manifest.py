"""`manifest.json`: the content of a task's folder, with sizes and checksums (docs/contract.md, 3).

Everything is reached from the folder's descriptor. Links are followed only within it, and only files that are the
task's are opened.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal

import msgspec

from flowmesh.files.folder import Folder, Parts, refusal
from flowmesh.files.walk import Troubles
from flowmesh.results.safe_files import PARTIAL

MANIFEST_FILE = "manifest.json"
RESPONSES_FILE = "responses.json"
LOGS_FOLDER = "logs"
ARTIFACTS_FOLDER = "artifacts"

Kind = Literal["result", "logs", "artifact", "directory"]


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file or folder. Sizes in bytes, times in ISO 8601."""

    name: str
    path: str
    """Relative to the task's folder."""
    type: Kind
    required: bool
    status: Literal["present", "missing"]
    updated_at: str | None = None
    size: int | None = None
    sha256: str | None = None
    file_count: int | None = None
    reason: str | None = None
    """Why it is missing, or what of a folder is not counted."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The content of manifest.json."""

    task_id: str
    generated_at: str
    entries: tuple[Entry, ...]


class Known(msgspec.Struct, frozen=True):
    """A file's content as it was sent or written."""

    size: int
    sha256: str


def make_manifest(
    top: Folder, task_id: str, artifacts: Iterable[str] = (), known: Mapping[str, Known] | None = None
) -> Manifest:
    """The manifest of a task's folder.

    Args:
        artifacts: `spec.output.artifacts`.
        known: what was sent or written, by path: those files are not read again, as they may have changed since.

    Raises:
        OSError: the folder cannot be read.
    """
    required = list(dict.fromkeys([*(a.rstrip("/") for a in artifacts), RESPONSES_FILE, LOGS_FOLDER, ARTIFACTS_FOLDER]))
    required = [path for path in required if path != MANIFEST_FILE]  # it cannot hold its own checksum
    others = sorted(
        name
        for name in os.listdir(top.fd)
        if name not in required and name != MANIFEST_FILE and not name.endswith(PARTIAL) and _is_listed(top, name)
    )
    known = known or {}
    return Manifest(
        task_id=task_id,
        generated_at=_iso(datetime.now(UTC).timestamp()),
        entries=(
            *(_entry(top, path, True, known) for path in required),
            *(_entry(top, path, False, known) for path in others),
        ),
    )


def _is_listed(top: Folder, name: str) -> bool:
    try:
        mode = os.lstat(name, dir_fd=top.fd).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _entry(top: Folder, path: str, required: bool, known: Mapping[str, Known]) -> Entry:
    name = _text(path)
    entry = Entry(name=name, path=name, type=_kind(path, folder=False), required=required, status="missing")
    reason = ""
    try:
        parts = top.real(path)
        status = top.status(parts) if parts else None
        if parts and status is not None and stat.S_ISDIR(status.st_mode):
            return _of_folder(top, parts, status, entry)
        if parts and status is not None and stat.S_ISREG(status.st_mode):
            content = known.get("/".join(parts)) or _content(top, parts)
            updated_at = _iso(status.st_mtime)
            return msgspec.structs.replace(
                entry, status="present", updated_at=updated_at, size=content.size, sha256=content.sha256
            )
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        reason = error.strerror or ""
    return msgspec.structs.replace(entry, reason=reason or _why_missing(top, path))


def _of_folder(top: Folder, parts: Parts, status: os.stat_result, entry: Entry) -> Entry:
    size, count, reason = _tree(top, parts)
    return msgspec.structs.replace(
        entry,
        type=_kind(entry.path, folder=True),
        status="present",
        updated_at=_iso(status.st_mtime),
        size=size,
        file_count=count,
        reason=reason or None,
    )


def _content(top: Folder, parts: Parts) -> Known:
    """Size and checksum of the same bytes, of a file of any size, in constant memory."""
    with open(top.open_file(parts), "rb", buffering=0) as file:
        counted = _Counted(file)
        digest = hashlib.file_digest(counted, "sha256")  # type: ignore[arg-type]
    return Known(counted.size, digest.hexdigest())


class _Counted:
    """A file that counts what is read from it."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self._file.readinto(buffer)
        self.size += count
        return count


def _why_missing(top: Folder, path: str) -> str:
    above, _, name = path.rpartition("/")
    try:
        parts = top.real(above)
        if parts is None:
            return "its path leads through a link out of the task's folder, or it cannot be read"
        mode = top.status((*parts, name)).st_mode
    except OSError:
        return "the task wrote no such file or folder"
    if stat.S_ISLNK(mode):
        return "it is a link that leads nowhere or out of the task's folder"
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return "its path leads through a link out of the task's folder, or it cannot be read"
    return "it is neither a file nor a folder"


def _kind(path: str, *, folder: bool) -> Kind:
    match path:
        case "responses.json":
            return "result"
        case "logs":
            return "logs"
        case "artifacts":
            return "directory"
    return "directory" if folder else "artifact"


def _tree(top: Folder, parts: Parts) -> tuple[int, int, str]:
    """Total bytes and number of the regular files below a folder, and what is not counted; links are not followed."""
    size = count = 0
    troubles = Troubles()
    with top.part(parts) as folder:
        for entry in folder.entries(troubles):
            if not entry.is_file:
                continue
            if why := refusal(entry.status, top.owner):
                troubles.add(OSError(errno.EPERM, why), [entry.name])
                continue
            size += entry.status.st_size
            count += 1
    return size, count, f"not counted: {troubles}" if troubles else ""


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _text(path: str) -> str:
    """A name as valid UTF-8: other bytes are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")
