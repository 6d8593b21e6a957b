"""The folder that an agent's file tools work in. No path and no link leads out of it, whoever made the link.

Each component of a path is opened relative to its parent without following links: what is checked is what is opened,
also while a command changes the folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from flowmesh.files import removal
from flowmesh.files.beneath import open_beneath
from flowmesh.files.folder import Folder
from flowmesh.files.walk import Entry, Troubles, walk
from runners.agent.usage import DEEPEST, open_own

MAX_READ_BYTES = 16 * 2**20
MAX_LISTED = 500
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PathRefused(ValueError):
    """A path outside the folder, or of the wrong kind. The message is for the model."""


class Workspace:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()

    def read(self, path: str, limit_bytes: int = MAX_READ_BYTES) -> bytes:
        """A file's content.

        Raises:
            PathRefused: it is not in the folder, not a regular file, or too large.
        """
        with self._parent(path, create=False) as (parent, name):
            try:
                fd = os.open(name, _READ, dir_fd=parent)
            except OSError as error:
                raise PathRefused(f"{path!r}: {_reason(error)}") from None
            with _regular(fd, "rb", path) as file:
                about = os.fstat(fd)
                if about.st_size > limit_bytes:
                    raise PathRefused(f"{path!r} has {about.st_size} bytes; at most {limit_bytes} can be read")
                return file.read(limit_bytes + 1)[:limit_bytes]

    def write(self, path: str, data: bytes) -> None:
        """Write a file and create its parent folders.

        Raises:
            PathRefused: it is not in the folder, or not a regular file.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._parent(path, create=True) as (parent, name):
            try:
                fd = os.open(name, flags, 0o644, dir_fd=parent)
            except OSError as error:
                raise PathRefused(f"{path!r}: {_reason(error)}") from None
            with _regular(fd, "wb", path) as file:
                file.write(data)

    def listing(self) -> list[str]:
        """Files below the folder with their sizes, except those in hidden folders; links are not followed."""
        lines: list[str] = []
        with Folder.open(self.folder) as top:
            for entry in walk(top.fd, Troubles(), ordered=True, passed_over=lambda name: name.startswith(".")):
                if not entry.is_folder:
                    lines.append(f"{entry.path} ({entry.status.st_size} bytes)")
                if len(lines) >= MAX_LISTED:
                    return [*lines, "… and more"]
        return lines

    def tidy(self) -> list[str]:
        """Remove what cannot be packed and delivered: scratch, links that lead out, folders nested too deep, and
        what is neither file nor folder. Files lose what would give others rights: set-id bits and capabilities.

        Returns:
            What was removed, except the scratch.
        """
        dropped: list[str] = []
        with Folder(open_own(self.folder), self.folder) as top:
            left = [removal.remove(top.fd, ".tmp")]
            troubles = Troubles()
            for entry in walk(top.fd, troubles, ordered=True, rights=0o755):
                if entry.is_file or (entry.is_folder and entry.depth < DEEPEST):
                    _make_plain(entry)
                elif entry.is_folder or not _stays(entry, top):
                    left.append(removal.remove(entry.folder, entry.name))
                    dropped.append(entry.path)
        if remains := [str(each) for each in (*left, troubles) if each]:
            logging.getLogger(__name__).warning("%s cannot be tidied: %s", self.folder, "; ".join(remains[:3]))
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # only where it is empty
        return dropped

    @contextlib.contextmanager
    def _parent(self, path: str, *, create: bool) -> Iterator[tuple[int, str]]:
        """The opened parent folder of `path`, and the last component."""
        parts = self._parts(path)
        fd = os.open(self.folder, _FOLDER)
        try:
            for part in parts[:-1]:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=fd)
                try:
                    below = os.open(part, _FOLDER, dir_fd=fd)
                except OSError as error:
                    raise PathRefused(f"{path!r}: {part!r}: {_reason(error)}") from None
                os.close(fd)
                fd = below
            yield fd, parts[-1]
        finally:
            os.close(fd)

    def _parts(self, path: str) -> tuple[str, ...]:
        inside = path.removeprefix(f"{self.folder}/") if path.startswith("/") else path
        parts = PurePosixPath(inside).parts
        if len(parts) > DEEPEST:
            raise PathRefused(f"{path[:80]!r}… is nested more than {DEEPEST} folders deep")
        if not parts or inside.startswith("/") or ".." in parts or "\0" in path:
            raise PathRefused(f"{path!r} is not in the task's folder; give a path relative to it, without `..`")
        return parts


def _regular(fd: int, mode: str, path: str) -> IO[bytes]:
    """The descriptor as a file object; refuses pipes, devices and folders."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PathRefused(f"{path!r} is not a regular file")
    return os.fdopen(fd, mode)


def _make_plain(entry: Entry) -> None:
    """Readable for its owner, without set-id bits and without capabilities."""
    try:
        handle = open_beneath(entry.folder, entry.name, os.O_PATH)
    except OSError:  # gone, or something is mounted there
        return
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISLNK(mode):
            return
        path = f"/proc/self/fd/{handle}"  # leads to what is open, not to a name
        wanted = mode & 0o777 | (0o755 if stat.S_ISDIR(mode) else stat.S_IRUSR)
        if mode & 0o7777 != wanted:
            os.chmod(path, wanted)  # noqa: PTH101 - a descriptor of O_PATH has no fchmod
        with contextlib.suppress(OSError):  # it has none, or the file system knows none
            os.removexattr(path, "security.capability")
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, however deep. Nothing happens where there is none."""
    removal.remove_path(path)


def _stays(entry: Entry, top: Folder) -> bool:
    """Whether it is a relative link to something in the folder."""
    try:
        return not os.readlink(entry.name, dir_fd=entry.folder).startswith("/") and top.real(entry.path) is not None
    except OSError:  # no link, or a loop of them
        return False


def _reason(error: OSError) -> str:
    import errno

    if error.errno == errno.ELOOP:
        return "is a link, and links are not followed"
    if error.errno == errno.ENOTDIR:
        return "is not a folder, or is a link to one"
    return (error.strerror or "cannot be opened").lower()
