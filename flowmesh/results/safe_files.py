"""Atomic writes of small files, and safe reads in folders where a task may have put links or pipes."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from flowmesh.errors import DeliveryError
from flowmesh.files.removal import remove
from flowmesh.files.safe_folder import open_folder
from flowmesh.messages.text import encode_json

PARTIAL = ".partial"
_MODE = 0o644
_PRIVATE = 0o600
MAX_NOTE_BYTES = 64 * 1024**2
"""Limit for the files that the node and its delivery child exchange."""
T = TypeVar("T")


def write_atomic(path: Path, data: bytes, *, private: bool = False, folder: int | None = None) -> None:
    """Replace the file at `path` atomically: a reader sees the old content or the new, whatever is killed meanwhile.

    Args:
        private: readable by the node's user only.
        folder: a descriptor of the folder that `path` is relative to.
    """
    os.close(_write(str(path), data, _PRIVATE if private else _MODE, folder))


def write_in_task(folder: int, name: str, data: bytes) -> int:
    """Write a file atomically into a task's folder. Whatever the task has left under that name is removed.

    Args:
        folder: its descriptor.

    Returns:
        a descriptor of the file, to read what was written whatever becomes of its name.

    Raises:
        OSError: it cannot be written.
    """
    try:
        return _write(name, data, _MODE, folder)
    except (IsADirectoryError, FileExistsError):
        for each in (name, _partial(name)):
            remove(folder, each)
        return _write(name, data, _MODE, folder)


def _partial(path: str) -> str:
    above, slash, name = path.rpartition("/")
    return f"{above}{slash}.{name}.{os.getpid()}{PARTIAL}"


def _write(path: str, data: bytes, mode: int, folder: int | None) -> int:
    partial = _partial(path)
    # O_EXCL and O_NOFOLLOW: a link that a task has left under that name is not written through
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        os.unlink(partial, dir_fd=folder)
    fd = os.open(partial, flags, mode, dir_fd=folder)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.replace(partial, path, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(partial, dir_fd=folder)
        raise
    return fd


def write_in(folder: Path, name: str, data: bytes, *, make: bool = False) -> None:
    """Write a file atomically into a task's folder, which is opened without following links.

    Raises:
        OSError: `open_folder` refuses the folder, or the file cannot be written.
    """
    at = open_folder(folder, make=make)
    try:
        os.close(write_in_task(at, name, data))
    except OSError as error:
        error.filename = str(folder / name)
        raise
    finally:
        os.close(at)


def open_regular(path: Path | str, flags: int = os.O_RDONLY, *, folder: int | None = None) -> int:
    """A descriptor of a file in a folder that a task may write to.

    Refuses links, and hard links to another user's file; does not block on a named pipe.

    Args:
        folder: a descriptor of the folder that `path` is relative to.

    Raises:
        OSError: there is none, or it is not a regular file, or it is a hard link to another user's file.
    """
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
        if status.st_nlink > 1 and status.st_uid != _owner(path, folder):
            raise OSError(errno.EPERM, "it is a hard link to another user's file", os.fspath(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _owner(path: Path | str, folder: int | None) -> int:
    """The owner of the folder that contains `path`."""
    return os.stat(os.path.dirname(path) or ".", dir_fd=folder).st_uid  # noqa: PTH120


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """The content of such a file.

    Raises:
        OSError: as for `open_regular`, or it is larger than `limit_bytes`.
    """
    with open(open_regular(path), "rb") as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        if status.st_nlink > 1:  # who writes such a file renames it into place
            raise OSError(errno.EPERM, "it has a second name, perhaps as another user's file", os.fspath(path))
        if size > limit_bytes:
            raise OSError(errno.EFBIG, f"it is larger than {limit_bytes} bytes", os.fspath(path))
        return file.read(size)


def read_exactly(fd: int, size: int, chunk_bytes: int, name: str) -> Iterator[bytes]:
    """The first `size` bytes of an open file, in chunks; its position does not matter and does not change.

    Args:
        name: for the error.

    Raises:
        OSError: it cannot be read.
        DeliveryError: it became shorter since `size` was read.
    """
    at = 0
    while at < size:
        data = os.pread(fd, min(chunk_bytes, size - at), at)
        if not data:
            raise DeliveryError(f"{name} became shorter while it was read")
        at += len(data)
        yield data


def read_note(path: Path, kind: type[T]) -> T | None:
    """The JSON in a file, decoded as `kind`; None where there is no file or it cannot be decoded."""
    try:
        return msgspec.json.decode(read_regular(path, MAX_NOTE_BYTES), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def to_json(value: Any) -> bytes:
    """Indented JSON with a newline at the end. Numbers that are not finite become null, half surrogate pairs U+FFFD."""
    return msgspec.json.format(encode_json(value), indent=2) + b"\n"
