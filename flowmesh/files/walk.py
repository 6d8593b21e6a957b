"""Looks at everything below a folder: any depth, no link followed, no mount point crossed, few descriptors."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

from flowmesh.files.descent import Descent
from flowmesh.files.names import shown

RIGHTS = 0o500
"""What a folder needs to be looked at."""
MOST_FOLDERS = 100_000
"""Directly in one folder, if the walk is not ordered: their names are in memory."""


class Entry:
    """One entry. `folder` is valid until the walk goes on."""

    __slots__ = ("_way", "folder", "name", "status")

    def __init__(self, way: list[str], folder: int, name: str, status: os.stat_result) -> None:
        self._way = way
        self.folder = folder
        """A descriptor of the folder that holds it."""
        self.name = name
        self.status = status
        """Of the entry itself, if it is a link."""

    @property
    def path(self) -> str:
        """Relative to the top of the walk. Made on demand: it can be megabytes long."""
        return "/".join((*self._way, self.name))

    @property
    def depth(self) -> int:
        """Number of folders between the top and it; 0: directly in the top."""
        return len(self._way)

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.status.st_mode)


class Troubles:
    """What a walk could not look at."""

    def __init__(self) -> None:
        self.count = 0
        self.first: OSError | None = None

    def add(self, error: OSError, names: list[str]) -> None:
        self.count += 1
        if self.first is None:
            self.first = OSError(error.errno, error.strerror or str(error), shown("/".join(names)))

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        """One line; empty if there is none."""
        if self.first is None:
            return ""
        one = f"{self.first.filename or '.'}: {self.first.strerror}"
        return one if self.count == 1 else f"{self.count} entries, such as {one}"

    def check(self) -> None:
        """
        Raises:
            OSError: there was one; it is the first.
        """
        if self.first is not None:
            raise self.first


def walk(
    top: int,
    troubles: Troubles,
    *,
    ordered: bool = False,
    rights: int = RIGHTS,
    passed_over: Callable[[str], bool] = lambda _: False,
) -> Iterator[Entry]:
    """Everything below a folder, folders before what they hold.

    Args:
        top: a descriptor, which stays the caller's.
        troubles: gets what cannot be looked at.
        ordered: by name, so that two folders of the same content give the same order; this keeps the names of each
            folder on the way in memory.
        rights: the owner's that folders of ours get; 0: nothing is changed.
        passed_over: whether folders of this name are not entered.
    """
    with Descent(top, rights) as way:
        pending = [_look(way, troubles, ordered)]
        while pending:
            for entry, enter in pending[-1]:
                yield entry
                if enter and not passed_over(entry.name):
                    try:
                        way.down(entry.name)
                    except OSError as error:
                        if not isinstance(error, FileNotFoundError):
                            troubles.add(error, [*way.names, entry.name])
                        continue
                    pending.append(_look(way, troubles, ordered))
                    break
            else:
                pending.pop()
                if pending:
                    try:
                        way.up()
                    except OSError as error:
                        troubles.add(error, list(way.names))
                        return


def _look(way: Descent, troubles: Troubles, ordered: bool) -> Iterator[tuple[Entry, bool]]:
    """The entries of the folder where we are, and whether to enter them; continued after one was entered and left."""
    names: list[str] = []
    try:
        if ordered:
            names = sorted(os.listdir(way.fd), key=os.fsencode)
        else:
            with os.scandir(way.fd) as entries:
                for each in entries:
                    if not each.is_dir(follow_symlinks=False):
                        yield from _entry(way, each.name, troubles)
                    elif len(names) < MOST_FOLDERS:
                        names.append(each.name)
                    else:
                        raise OSError(f"it holds more than {MOST_FOLDERS} folders")
    except OSError as error:
        troubles.add(error, list(way.names))
    for name in names:
        yield from _entry(way, name, troubles)


def _entry(way: Descent, name: str, troubles: Troubles) -> Iterator[tuple[Entry, bool]]:
    try:
        status = os.lstat(name, dir_fd=way.fd)
    except FileNotFoundError:
        return
    except OSError as error:
        troubles.add(error, [*way.names, name])
        return
    yield Entry(way.names, way.fd, name, status), stat.S_ISDIR(status.st_mode)
