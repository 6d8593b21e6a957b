"""A folder that a task may write to, opened once: everything in it is reached from its descriptor."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from flowmesh.files.beneath import open_beneath
from flowmesh.files.descent import open_with_rights
from flowmesh.files.names import shown
from flowmesh.files.safe_folder import open_folder
from flowmesh.files.walk import RIGHTS, Entry, Troubles, walk

MOST_LINKS = 40
"""Followed for one path, as in the kernel."""
Parts = tuple[str, ...]


class Folder:
    """Use it as a context manager, or close it.

    Args:
        fd: its descriptor, which is closed with it.
        path: where it was; for messages, and for links with an absolute target.
        owner: the user that tasks run as; None: the folder's, which got it when it was made.
    """

    def __init__(self, fd: int, path: Path, owner: int | None = None) -> None:
        self.fd = fd
        self.path = path
        self.owner = os.fstat(fd).st_uid if owner is None else owner

    @classmethod
    def open(cls, path: Path, *, make: bool = False) -> Folder:
        """Open the folder at `path`, made if asked for; no part of the path may be a link.

        Raises:
            OSError: as for `open_folder`.
        """
        return cls(open_folder(path, make=make), path)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def real(self, path: str) -> Parts | None:
        """A path below the folder with its links resolved, as names; None if it leads out of the folder.

        Each link is read and followed by us, so the kernel follows none. The path need not exist.

        Raises:
            OSError: a folder on the way cannot be searched, or links form a loop.
        """
        pending = deque(_split(path))
        real: list[str] = []
        links = 0
        while pending:
            name = pending.popleft()
            if name == "..":
                if not real:
                    return None
                real.pop()
                continue
            target = self._link(real, name)
            if target is None:
                real.append(name)
                continue
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), shown(path))
            if target.startswith("/"):
                inside = target.removeprefix(f"{self.path}/")
                if inside == target:
                    return None
                target = inside
                real.clear()
            pending.extendleft(reversed(_split(target)))
        return tuple(real)

    def _link(self, parents: list[str], name: str) -> str | None:
        """The target of a link; None if it is none, or is missing."""
        try:
            with self.below(parents) as folder:
                if stat.S_ISLNK(os.lstat(name, dir_fd=folder).st_mode):
                    return os.readlink(name, dir_fd=folder)
        except (FileNotFoundError, NotADirectoryError):
            pass
        return None

    @contextlib.contextmanager
    def below(self, parts: Parts | list[str]) -> Iterator[int]:
        """The descriptor of a folder below; open within the block.

        Args:
            parts: names without links, as `real` gives them; none of them is this folder itself.

        Raises:
            OSError: it is no folder, or a link, or something is mounted there.
        """
        folder = os.dup(self.fd)
        try:
            for name in parts:
                above, folder = folder, open_with_rights(folder, name, RIGHTS)
                os.close(above)
            yield folder
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def part(self, parts: Parts) -> Iterator[Folder]:
        """A folder below, with the same owner of files; open within the block.

        Raises:
            OSError: as for `below`.
        """
        with self.below(parts) as fd, Folder(os.dup(fd), self.path.joinpath(*parts), self.owner) as part:
            yield part

    def status(self, parts: Parts) -> os.stat_result:
        """Of an entry below, which may be a link.

        Raises:
            OSError: there is none.
        """
        if not parts:
            return os.fstat(self.fd)
        with self.below(parts[:-1]) as folder:
            return os.lstat(parts[-1], dir_fd=folder)

    def open_file(self, parts: Parts) -> int:
        """A descriptor of a regular file below, to be read.

        Raises:
            OSError: there is none, or it may not be read for the task; see `open_file`.
        """
        with self.below(parts[:-1]) as folder:
            return open_file(folder, parts[-1], self.owner)

    def entries(self, troubles: Troubles, *, ordered: bool = False) -> Iterator[Entry]:
        """Everything below; see `walk`."""
        return walk(self.fd, troubles, ordered=ordered)


def open_file(folder: int, name: str, owner: int, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file that a task with the user `owner` may hand to us.

    We may have more rights than the task: another user's file does not count as the task's because it has a name in
    the task's folder.

    Raises:
        OSError: there is none, or it is a link, not a regular file, or another user's file.
    """
    if not stat.S_ISREG(os.lstat(name, dir_fd=folder).st_mode):  # so that no pipe or device is opened
        raise OSError(errno.EINVAL, "it is not a regular file", shown(name))
    fd = open_beneath(folder, name, flags | os.O_NONBLOCK)
    try:
        if why := refusal(os.fstat(fd), owner):
            raise OSError(errno.EPERM, why, shown(name))
    except BaseException:
        os.close(fd)
        raise
    return fd


def refusal(status: os.stat_result, owner: int) -> str:
    """Why a file must not be read for a task with the user `owner`; empty if it may."""
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_uid == owner:
        return ""
    if status.st_nlink > 1:
        return "it is a hard link to another user's file"
    if status.st_uid != os.geteuid() and owner != os.geteuid():
        return "it is another user's file"
    return ""


def _split(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in {"", "."}]
