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
from flowmesh.messages.text import encode_json
from flowmesh.processes.safe_folder import open_folder

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
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    # O_EXCL and O_NOFOLLOW: a link that a task has left under that name is not written through
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial, dir_fd=folder)
    try:
        with open(os.open(partial, flags, _PRIVATE if private else _MODE, dir_fd=folder), "wb") as file:
            file.write(data)
        os.replace(partial, path, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial, dir_fd=folder)
        raise


def write_in(folder: Path, name: str, data: bytes, *, make: bool = False) -> None:
    """Write a file atomically into a task's folder, which is opened without following links.

    Raises:
        OSError: `open_folder` refuses the folder, or the file cannot be written.
    """
    at = open_folder(folder, make=make)
    try:
        write_atomic(Path(name), data, folder=at)
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
        size = os.fstat(file.fileno()).st_size
        if size > limit_bytes:
            raise OSError(errno.EFBIG, f"it is larger than {limit_bytes} bytes", os.fspath(path))
        return file.read(size)


def read_exactly(path: Path, size: int, chunk_bytes: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, in chunks. A symbolic link is not followed.

    Raises:
        OSError: it cannot be read.
        DeliveryError: it became shorter since `size` was read.
    """
    left = size
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as file:
        while left:
            data = file.read(min(chunk_bytes, left))
            if not data:
                raise DeliveryError(f"{path.name} became shorter while it was read")
            left -= len(data)
            yield data


def read_note(path: Path, kind: type[T]) -> T | None:
    """The JSON in a file, decoded as `kind`; None where there is no file or it cannot be decoded."""
    try:
        return msgspec.json.decode(read_regular(path, MAX_NOTE_BYTES), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def below(folder: Path | str, *, strict: bool = False) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder except folders; links are not followed.

    Args:
        strict: raise for a folder that cannot be read, instead of skipping it.

    Raises:
        OSError: `strict` is set, and a folder cannot be read.
    """
    open_ = [os.fspath(folder)]
    while open_:
        try:
            with os.scandir(open_.pop()) as entries:
                found = list(entries)
        except OSError:
            if strict:
                raise
            continue
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                open_.append(entry.path)
            else:
                yield entry


def to_json(value: Any) -> bytes:
    """Indented JSON with a newline at the end. Numbers that are not finite become null, half surrogate pairs U+FFFD."""
    return msgspec.json.format(encode_json(value), indent=2) + b"\n"
