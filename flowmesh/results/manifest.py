"""`manifest.json`: the content of a task's folder, with sizes and checksums (docs/contract.md, 3).

Symbolic links are followed only within the folder, and only regular files are opened.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from flowmesh.results.safe_files import PARTIAL, below, to_json, write_in
from flowmesh.results.safe_names import is_plain_name, within

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
    """Why it is missing."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The content of manifest.json."""

    task_id: str
    generated_at: str
    entries: tuple[Entry, ...]


def write_manifest(
    folder: Path, task_id: str, artifacts: Iterable[str] = (), known_sha256: Mapping[str, str] | None = None
) -> Manifest:
    """Write the manifest of `folder`.

    Args:
        artifacts: `spec.output.artifacts`.
        known_sha256: checksums of top-level files that are known already, by name.

    Raises:
        OSError: the folder cannot be read or written.
    """
    required = list(dict.fromkeys([*(a.rstrip("/") for a in artifacts), RESPONSES_FILE, LOGS_FOLDER, ARTIFACTS_FOLDER]))
    required = [path for path in required if path != MANIFEST_FILE]  # it cannot hold its own checksum
    others = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name not in required
        and entry.name != MANIFEST_FILE
        and not entry.name.endswith(PARTIAL)
        and (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False))
    )
    known = known_sha256 or {}
    manifest = Manifest(
        task_id=task_id,
        generated_at=_iso(datetime.now(UTC).timestamp()),
        entries=(
            *(_entry(folder, path, True, known) for path in required),
            *(_entry(folder, path, False, known) for path in others),
        ),
    )
    write_in(folder, MANIFEST_FILE, to_json(manifest))
    return manifest


def sha256_of(path: Path) -> str:
    """The checksum of a file of any size, in constant memory."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(folder: Path, path: str, required: bool, known: Mapping[str, str]) -> Entry:
    name = _text(path)
    real, status = _look(folder, path)
    if real is None or status is None or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        kind = _kind(path, folder=False)
        reason = _why_missing(folder, path)
        return Entry(name=name, path=name, type=kind, required=required, status="missing", reason=reason)
    if stat.S_ISDIR(status.st_mode):
        size, count = _tree(real)
        digest = None
    else:
        size, count = status.st_size, None
        digest = known.get(path) or sha256_of(real)
    return Entry(
        name=name,
        path=name,
        type=_kind(path, folder=count is not None),
        required=required,
        status="present",
        updated_at=_iso(status.st_mtime),
        size=size,
        sha256=digest,
        file_count=count,
    )


def _look(folder: Path, path: str) -> tuple[Path | None, os.stat_result | None]:
    """`path` with links resolved and its status; None where it is missing or leads out of `folder`."""
    try:
        if is_plain_name(path) and not stat.S_ISLNK((status := (folder / path).lstat()).st_mode):
            return folder / path, status
        real = within(folder / path, folder)
        return real, None if real is None else real.stat()
    except OSError:
        return None, None


def _why_missing(folder: Path, path: str) -> str:
    try:
        status = (folder / path).lstat()
    except OSError:
        return "the task wrote no such file or folder"
    if stat.S_ISLNK(status.st_mode):
        return "it is a link that leads nowhere or out of the task's folder"
    if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
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


def _tree(folder: Path) -> tuple[int, int]:
    """Total bytes and number of the regular files below `folder`; links are not followed."""
    size = count = 0
    for entry in below(folder, strict=True):
        if entry.is_file(follow_symlinks=False):
            size += entry.stat(follow_symlinks=False).st_size
            count += 1
    return size, count


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _text(path: str) -> str:
    """A name as valid UTF-8: other bytes are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")
