"""The folder that an agent's file tools work in. No path and no link leads out of it, whoever made the link.

Each component of a path is opened relative to its parent without following links: what is checked is what is opened,
also while a command changes the folder.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from flowmesh.files.folder import Folder
from flowmesh.files.removal import remove_path
from flowmesh.files.walk import Troubles, walk
from runners.agent.usage import DEEPEST, SET_ID, change_mode

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
        remove(self.folder / ".tmp")
        dropped: list[str] = []
        todo = [(self.folder, 0)]
        while todo:
            folder, depth = todo.pop()
            change_mode(os.fspath(folder), 0o755)  # a command may have removed our access to it
            for entry in sorted(os.scandir(folder), key=lambda each: each.name):
                full = Path(entry.path)
                if entry.is_dir(follow_symlinks=False) and depth < DEEPEST:
                    todo.append((full, depth + 1))
                elif entry.is_file(follow_symlinks=False):
                    _make_plain(full)
                elif not (entry.is_symlink() and _stays(full, self.folder)):
                    remove(full)
                    dropped.append(str(full.relative_to(self.folder)))
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


def _make_plain(file: Path) -> None:
    """Readable for its owner, without set-id bits and without capabilities."""
    mode = file.lstat().st_mode
    if mode & SET_ID or not mode & stat.S_IRUSR:
        change_mode(os.fspath(file), mode & 0o777 | stat.S_IRUSR)
    with contextlib.suppress(OSError):  # it has none, or the file system knows none
        os.removexattr(file, "security.capability", follow_symlinks=False)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, however deep. Nothing happens where there is none."""
    remove_path(path)


def _stays(link: Path, root: Path) -> bool:
    try:
        return not link.readlink().is_absolute() and link.resolve().is_relative_to(root)
    except (OSError, RuntimeError):
        return False


def _reason(error: OSError) -> str:
    import errno

    if error.errno == errno.ELOOP:
        return "is a link, and links are not followed"
    if error.errno == errno.ENOTDIR:
        return "is not a folder, or is a link to one"
    return (error.strerror or "cannot be opened").lower()
