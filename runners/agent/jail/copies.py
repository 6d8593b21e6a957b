"""A work folder in memory: copied in before the command, and what changed copied back after it.

Everything is opened relative to its folder; no link is followed, and no mount point crossed. What is copied back has
neither set-id bits nor a mode that hides it from its owner; what is no file, folder or link, and folders nested too
deep, stay behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from flowmesh.files.beneath import open_beneath
from flowmesh.files.descent import open_with_rights
from flowmesh.files.removal import remove

DEEPEST = 100
"""Nesting of folders that is kept. Deeper ones could not be packed and delivered."""
ENTRY_BYTES = 4096
"""Least that a file or folder counts for."""
_PIECE = 1 << 20
_PART = "part"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_NAMED, _NAMED_CHARS = 50, 500

Tree = dict[str, Any]
"""By name: a Tree, the target of a link, a File, or None for what was not copied."""


class File(NamedTuple):
    """A file's state after it was copied in. The sum finds changes by mmap, which change no time in a tmpfs."""

    inode: int
    size: int
    ctime_ns: int
    crc: int


def open_folder(name: str, parent: int | None = None) -> int:
    return os.open(name, _FOLDER, dir_fd=parent)


def usage(folder: int, depth: int = 0) -> tuple[int, int]:
    """Bytes and number of the entries below an opened folder."""
    total, count = 0, 0
    for entry in _entries(folder):
        with contextlib.suppress(OSError):
            total += max(entry.stat(follow_symlinks=False).st_blocks * 512, ENTRY_BYTES)
            count += 1
            if entry.is_dir(follow_symlinks=False) and depth < DEEPEST:
                with _folder(entry.name, folder) as inner:
                    below, more = usage(inner, depth + 1)
                total, count = total + below, count + more
    return total, count


def copy_in(source: int, target: int, depth: int = 0) -> Tree:
    """Copy the content of one opened folder into another, and remember it."""
    tree: Tree = {}
    for entry in _entries(source):
        name = entry.name
        tree[name] = None
        about = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(about.st_mode) and depth < DEEPEST:
            with _not_mounted(), _folder(name, source) as there, _folder(name, target, make=True) as here:
                tree[name] = copy_in(there, here, depth + 1)
                os.fchmod(here, about.st_mode & 0o777)
                os.utime(here, ns=(about.st_atime_ns, about.st_mtime_ns))
        elif stat.S_ISLNK(about.st_mode):
            tree[name] = os.readlink(name, dir_fd=source)
            os.symlink(tree[name], name, dir_fd=target)
        elif stat.S_ISREG(about.st_mode):
            with contextlib.suppress(PermissionError), _not_mounted():
                _copy_file(name, source, name, target)
                tree[name] = _state(name, target)
    return tree


@contextlib.contextmanager
def scratch(folder: int) -> Iterator[int]:
    """A new folder in an opened one, removed at the end. The command cannot have seen its name in use."""
    name = f".back-{os.getpid()}"
    _remove(name, folder)
    os.mkdir(name, 0o700, dir_fd=folder)
    try:
        with _folder(name, folder) as opened:
            yield opened
    finally:
        remove(folder, name)


class Back:
    """Copies back what differs from `known` in an opened folder, and removes there what the command removed."""

    def __init__(self, scratch: int) -> None:
        """
        Args:
            scratch: an opened folder on the target's file system, for files that are not complete yet.
        """
        self._scratch = scratch
        self.left: list[str] = []
        """What stayed behind, by path; the first of them."""

    def copy(self, source: int, target: int, known: Tree, prefix: str = "") -> None:
        """
        Args:
            prefix: the folder's path in the work folder, with a slash at its end.
        """
        gone = set(known)
        for entry in _entries(source):
            name = entry.name
            gone.discard(name)
            about = entry.stat(follow_symlinks=False)
            before = known.get(name)
            if stat.S_ISDIR(about.st_mode) and prefix.count("/") < DEEPEST:
                self._folder(name, source, target, before, f"{prefix}{name}/")
            elif stat.S_ISLNK(about.st_mode):
                link = os.readlink(name, dir_fd=source)
                if link != before:
                    _remove(name, target)
                    os.symlink(link, name, dir_fd=target)
            elif stat.S_ISREG(about.st_mode):
                if not _unchanged(name, source, about, before):
                    self._file(name, source, target)
            else:
                self._leave(prefix + name)
        for name in gone:
            if known[name] is not None and remove(target, name):
                self._leave(prefix + name)

    def _leave(self, path: str) -> None:
        if len(self.left) < _MOST_NAMED:
            self.left.append(path[:_NAMED_CHARS])

    def _folder(self, name: str, source: int, target: int, before: Any, prefix: str) -> None:
        if not isinstance(before, dict) and not _is_folder(name, target):
            _remove(name, target)
        with contextlib.ExitStack() as opened:
            here = opened.enter_context(_folder(name, source))
            try:
                there = opened.enter_context(_folder(name, target, make=True))
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                self._leave(prefix)
                return
            self.copy(here, there, before if isinstance(before, dict) else {}, prefix)
            os.fchmod(there, os.fstat(here).st_mode & 0o777 | 0o700)

    def _file(self, name: str, source: int, target: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_PART, dir_fd=self._scratch)
        _copy_file(name, source, _PART, self._scratch)
        if _is_folder(name, target):
            _remove(name, target)
        os.rename(_PART, name, src_dir_fd=self._scratch, dst_dir_fd=target)


def _unchanged(name: str, folder: int, about: os.stat_result, before: Any) -> bool:
    same = isinstance(before, File) and before[:3] == (about.st_ino, about.st_size, about.st_ctime_ns)
    return same and _state(name, folder) == before


def _state(name: str, folder: int) -> File:
    with _opened(name, folder) as fd:
        crc = 0
        for offset, data in _pieces(fd):
            crc = zlib.crc32(data, zlib.crc32(offset.to_bytes(8, "little"), crc))
        about = os.fstat(fd)
    return File(about.st_ino, about.st_size, about.st_ctime_ns, crc)


def _copy_file(name: str, source: int, to: str, target: int) -> None:
    """Copy a regular file with its mode, but no set-id bits, and its times; holes stay holes."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _opened(name, source) as fd:
        about = os.fstat(fd)
        out = os.open(to, flags, 0o600, dir_fd=target)
        try:
            for offset, data in _pieces(fd):
                written = 0
                while written < len(data):
                    written += os.pwrite(out, data[written:], offset + written)
            os.ftruncate(out, about.st_size)
            os.fchmod(out, about.st_mode & 0o777 | 0o600)
            os.utime(out, ns=(about.st_atime_ns, about.st_mtime_ns))
        finally:
            os.close(out)


def _pieces(fd: int) -> Iterator[tuple[int, bytes]]:
    """The data of a file by offset; holes are left out."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError:
            return  # no more data
        while start < end and (data := os.pread(fd, min(_PIECE, end - start), start)):
            yield start, data
            start += len(data)


def _entries(folder: int) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


@contextlib.contextmanager
def _opened(name: str, parent: int) -> Iterator[int]:
    fd = open_beneath(parent, name, _READ)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _folder(name: str, parent: int, *, make: bool = False) -> Iterator[int]:
    """A folder in an opened one, with the rights that we need in it if it is ours."""
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
    fd = open_with_rights(parent, name, 0o700)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _not_mounted() -> Iterator[None]:
    """Leaves out what is a mount point."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise


def _is_folder(name: str, parent: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _remove(name: str, parent: int) -> None:
    """Remove a file, link, or folder with its content, however deep. Nothing happens where there is none.

    Raises:
        OSError: not all of it could be removed.
    """
    if left := remove(parent, name):
        raise OSError(errno.EBUSY, f"cannot be removed: {left}")
