"""Small files written whole or not at all, JSON in them, and files read where a task may have put something else."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from flowmesh.processes.safe_folder import open_folder

PARTIAL = ".partial"
_MODE = 0o644
_PRIVATE = 0o600
MAX_NOTE_BYTES = 64 * 1024**2
"""Of what the node and its delivery child note for each other."""
T = TypeVar("T")


def write_atomic(path: Path, data: bytes, *, private: bool = False, folder: int | None = None) -> None:
    """Replace `path` by `data`: a reader sees the old file or the new one, whatever is killed in between.

    Args:
        folder: a descriptor of the folder that `path` is relative to.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    # O_EXCL with O_NOFOLLOW: what a task may have left under that name is not written through
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
    """Write such a file into a task's folder, where that really lies.

    Raises:
        OSError: as for `open_folder`, or it cannot be written.
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

    No link is followed to what is not the task's, and a pipe in the file's place holds nobody up.

    Args:
        folder: a descriptor of the folder that `path` is relative to.

    Raises:
        OSError: there is none, or it is no regular file, or another user's under a second name.
    """
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
        if status.st_nlink > 1 and status.st_uid != _owner(path, folder):
            raise OSError(errno.EPERM, "it is another user's file under a second name", os.fspath(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _owner(path: Path | str, folder: int | None) -> int:
    """Whose the folder is that `path` lies in."""
    return os.stat(os.path.dirname(path) or ".", dir_fd=folder).st_uid  # noqa: PTH120


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """What such a file holds.

    Raises:
        OSError: as for `open_regular`, or it is larger than that.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit_bytes:
            raise OSError(errno.EFBIG, f"it is over {limit_bytes} bytes", os.fspath(path))
        return file.read(size)


def read_note(path: Path, kind: type[T]) -> T | None:
    """What was noted there as JSON; None where that is nothing, or nothing that can be read."""
    try:
        return msgspec.json.decode(read_regular(path, MAX_NOTE_BYTES), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def below(folder: Path | str, *, strict: bool = False) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder that is no folder itself; links are not followed.

    Args:
        strict: a folder that cannot be read is not passed over.

    Raises:
        OSError: that was wanted, and there is one.
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
    """Indented JSON with a line's end. What is not finite is null."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
