"""A folder as `<folder>.tar.gz`, written in one pass: tar, gzip, checksum, file.

The same content gives the same bytes. The archive has one top folder, named like the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from flowmesh.errors import DeliveryError
from flowmesh.results.archive_members import members_of
from flowmesh.results.compress import compress
from flowmesh.results.safe_files import PARTIAL
from flowmesh.results.tar_stream import find_tar, tar_stream
from flowmesh.settings.schema import ArchiveSettings


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """A finished archive. Sizes in bytes."""

    path: str
    size: int
    sha256: str
    content_bytes: int
    notes: tuple[str, ...] = ()
    """For the delivery report: which program was missing, and what was used instead."""


class _ArchiveFile:
    """The archive's file: counts and checksums what is written to it."""

    def __init__(self, file: IO[bytes], on_written: Callable[[int], None]) -> None:
        self._file = file
        self._on_written = on_written
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self.size += len(data)
        self._on_written(self.size)
        return len(data)

    def flush(self) -> None:
        """Nothing is buffered here."""


def make_archive(
    folder: Path,
    target: Path,
    settings: ArchiveSettings,
    written: Callable[[int], None] = lambda _: None,
) -> Archive:
    """Archive `folder` as `target`, which appears when it is complete.

    Args:
        written: called with the number of compressed bytes so far, from any thread.

    Raises:
        DeliveryError: something in the folder cannot be archived, a program failed, or the disk is full.
    """
    members = members_of(folder)
    tar, tar_note = find_tar(settings.tar_bin)
    partial = target.with_name(target.name + PARTIAL)
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(partial, flags, 0o644), "wb", buffering=0) as raw:
            file = _ArchiveFile(raw, written)
            with tar_stream(tar, folder, members) as stream:
                gzip_note = compress(stream, file, settings)
        partial.replace(target)
    except OSError as error:
        raise DeliveryError(f"cannot write {target.name}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return Archive(
        path=str(target),
        size=file.size,
        sha256=file.digest.hexdigest(),
        content_bytes=sum(member.size for member in members),
        notes=tuple(note for note in (gzip_note, tar_note) if note),
    )
