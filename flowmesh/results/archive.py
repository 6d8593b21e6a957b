"""A folder as `<folder>.tar.gz`, written in one pass: tar, gzip, checksum, file.

The same content gives the same bytes. The archive has one top folder, named like the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from typing import IO

import msgspec

from flowmesh.errors import DeliveryError
from flowmesh.files.folder import Folder, Parts
from flowmesh.files.names import shown
from flowmesh.files.removal import remove
from flowmesh.results.compress import compress
from flowmesh.results.safe_files import PARTIAL
from flowmesh.results.tar_stream import find_tar, tar_stream
from flowmesh.settings.schema import ArchiveSettings


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """A finished archive. Sizes in bytes."""

    name: str
    size: int
    sha256: str
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
    top: Folder,
    parts: Parts,
    name: str,
    settings: ArchiveSettings,
    written: Callable[[int, int], None] = lambda _size, _fd: None,
) -> Archive:
    """Archive a folder as the file `name` beside it, which appears when it is complete.

    Args:
        top: the task's folder.
        parts: the folder to archive, below it.
        written: called with the number of compressed bytes so far and the archive's descriptor, from any thread.

    Raises:
        DeliveryError: something in the folder cannot be archived, a program failed, or the disk is full.
    """
    tar, tar_note = find_tar(settings.tar_bin)
    partial = name + PARTIAL
    with contextlib.ExitStack() as opened:
        try:
            beside = opened.enter_context(top.below(parts[:-1]))
            folder = opened.enter_context(top.part(parts))
        except OSError as error:
            why = error.strerror or str(error)
            raise DeliveryError(f"{shown('/'.join(parts))} is not a folder: it cannot be archived ({why})") from error
        remove(beside, partial)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(partial, flags, 0o644, dir_fd=beside), "r+b", buffering=0) as raw:
                file = _ArchiveFile(raw, lambda size: written(size, raw.fileno()))
                with tar_stream(tar, folder, beside) as stream:
                    gzip_note = compress(stream, file, settings)
            os.replace(partial, name, src_dir_fd=beside, dst_dir_fd=beside)
        except OSError as error:
            raise DeliveryError(f"cannot write {name}: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=beside)
    notes = tuple(note for note in (gzip_note, tar_note) if note)
    return Archive(name=name, size=file.size, sha256=file.digest.hexdigest(), notes=notes)
