"""Removes what a task left: a tree of any depth and size, in bounded memory and with few descriptors."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowmesh.files.descent import Descent, Moved, give_rights
from flowmesh.files.names import shown

RIGHTS = 0o700
"""What a folder needs so that its entries can be removed."""
MOST_NAMES = 10_000
"""Kept in memory of one folder at once."""
_TRIES = 3
"""From the top again, where somebody moves folders meanwhile."""
_SAMPLE = 1000
"""One of so many entries, and the first of each second look, is checked for being newer than the removal."""
_MOST_NEW = 20
"""Of the entries that were checked. Somebody still creates files then, perhaps faster than we can remove them."""


@dataclass(frozen=True)
class Left:
    """What could not be removed; false if all is gone."""

    count: int = 0
    path: str = ""
    """One of them, as it can be shown."""
    reason: str = ""

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        """One line."""
        if self.count <= 1:
            return f"{self.path}: {self.reason}" if self.count else "nothing is left"
        return f"{self.count} entries are left, such as {self.path}: {self.reason}"


def _open_plain(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def remove_path(path: Path, open_parent: Callable[[Path], int] = _open_plain) -> Left:
    """Remove what is at `path`, a file or a folder with all in it. Raises nothing: an OSError is in the report.

    Args:
        open_parent: opens the folder that holds it. The default is for folders that nobody else may write to.
    """
    try:
        parent = open_parent(path.parent)
    except FileNotFoundError:
        return Left()
    except OSError as error:
        return Left(1, shown(str(path)), error.strerror or str(error))
    try:
        return remove(parent, path.name)
    finally:
        os.close(parent)


def clear(path: Path) -> None:
    """Remove what is at `path`, a file or a folder with all in it, so that something can be made there.

    Raises:
        OSError: not all of it could be removed; names the first part that is left.
    """
    if left := remove_path(path):
        raise OSError(errno.EBUSY, f"cannot be removed: {left}", shown(str(path)))


def remove(parent: int, name: str) -> Left:
    """Remove the entry `name` of a folder, with all in it. Links are removed, not followed; mounts are left alone.

    Args:
        parent: a descriptor of the folder.

    Raises nothing: an OSError is in the report.
    """
    for _ in range(_TRIES):
        removal = _Removal()
        try:
            removal.run(parent, name)
            break
        except Moved as error:
            removal.note(error, [name])
        except OSError as error:
            removal.note(error, [name])
            break
    if not removal.count and _exists(parent, name):
        return Left(1, shown(name), "it is there again")
    return Left(removal.count, removal.path, removal.reason)


def empty(folder: int, keep: Callable[[str], bool]) -> dict[str, Left]:
    """Remove all that a folder holds.

    Args:
        folder: its descriptor.
        keep: whether an entry of this name stays.

    Returns:
        what is left, by the entry's name; the name `.` if the folder cannot be read.
    """
    left = {}
    give_rights(folder, RIGHTS)
    try:
        for name in os.listdir(folder):
            if not keep(name) and (remains := remove(folder, name)):
                left[name] = remains
    except OSError as error:
        left["."] = Left(1, ".", error.strerror or str(error))
    return left


class _Folder:
    """One folder on the way down."""

    def __init__(self) -> None:
        self.folders: list[str] = []
        """Still to be removed, as far as they are known."""
        self.failed: set[str] = set()
        self.more = False
        """Whether there are folders that did not fit into `folders`."""
        self.removed = False
        """Whether the last look at it, and what followed, removed anything."""


class _Removal:
    def __init__(self) -> None:
        self.count = 0
        self.path = ""
        self.reason = ""
        self._began = time.time()
        self._new = 0

    def run(self, parent: int, name: str) -> None:
        if not _is_folder(parent, name):
            self._unlink(parent, name, [])
            return
        with Descent(parent, RIGHTS) as way:
            start = _Folder()
            start.folders = [name]
            folders = [start]
            while folders:
                folder = folders[-1]
                if folder.folders:
                    self._enter(way, folders, folder.folders.pop())
                elif folder.more and folder.removed and len(folder.failed) < MOST_NAMES:
                    self._look(way, folder, again=True)
                else:
                    folders.pop()
                    if folders:
                        self._leave(way, folder, folders[-1])

    def _enter(self, way: Descent, folders: list[_Folder], name: str) -> None:
        with contextlib.suppress(OSError):  # most folders of a deep tree are not empty; the others are done here
            os.rmdir(name, dir_fd=way.fd)
            folders[-1].removed = True
            return
        try:
            way.down(name)
        except FileNotFoundError:
            return
        except NotADirectoryError:  # replaced by a file meanwhile
            self._unlink(way.fd, name, way.names)
            return
        except OSError as error:
            folders[-1].failed.add(name)
            self.note(error, [*way.names, name])
            return
        folders.append(_Folder())
        self._look(way, folders[-1])

    def _look(self, way: Descent, folder: _Folder, *, again: bool = False) -> None:
        """Remove the folder's files, and note its folders."""
        folder.more = folder.removed = False
        try:
            with os.scandir(way.fd) as entries:
                for number, entry in enumerate(entries, 0 if again else 1):
                    name = entry.name
                    if name in folder.failed:
                        continue
                    if number % _SAMPLE == 0:
                        self._check_age(entry)
                    if entry.is_dir(follow_symlinks=False):
                        if len(folder.folders) == MOST_NAMES:
                            folder.more = True
                            break
                        folder.folders.append(name)
                    elif self._unlink(way.fd, name, way.names):
                        folder.removed = True
                    elif len(folder.failed) < MOST_NAMES:
                        folder.failed.add(name)
        except OSError as error:
            self.note(error, way.names)

    def _leave(self, way: Descent, folder: _Folder, above: _Folder) -> None:
        name = way.up()
        try:
            os.rmdir(name, dir_fd=way.fd)
            above.removed = True
        except FileNotFoundError:
            above.removed = True
        except OSError as error:
            if error.errno == errno.ENOTEMPTY and not folder.failed and folder.removed and self._again():
                above.folders.append(name)  # the file system did not list all, or somebody still writes there
                return
            above.failed.add(name)
            if error.errno != errno.ENOTEMPTY or not self.count:  # else what it holds is counted
                self.note(error, [*way.names, name])

    def _check_age(self, entry: os.DirEntry[str]) -> None:
        status = entry.stat(follow_symlinks=False)
        if status.st_ctime > self._began and (status.st_nlink == 1 or entry.is_dir(follow_symlinks=False)):
            self._new += 1  # the change of a hard link may be ours: we removed another of its names
        if self._new > _MOST_NEW:
            raise OSError(errno.EBUSY, "somebody still creates files there")

    def _again(self) -> bool:
        """Whether to enter a folder again that was empty a moment ago."""
        self._new += 1
        return self._new <= _MOST_NEW

    def _unlink(self, folder: int, name: str, way: list[str]) -> bool:
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            return True
        except OSError as error:
            self.note(error, [*way, name])
            return False
        return True

    def note(self, error: OSError, names: list[str]) -> None:
        self.count += 1
        if not self.reason:
            self.path = shown("/".join(names))
            self.reason = "something is mounted there" if error.errno == errno.EXDEV else error.strerror or str(error)


def _is_folder(parent: int, name: str) -> bool:
    try:
        fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError:
        return False
    os.close(fd)
    return True


def _exists(parent: int, name: str) -> bool:
    try:
        os.lstat(name, dir_fd=parent)
    except OSError:
        return False
    return True
