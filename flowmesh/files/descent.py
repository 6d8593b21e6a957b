"""A position in a tree of folders of any depth, which holds at most three descriptors.

On the way down the folders above are closed; on the way up they are opened again by `..` and compared with what was
left there. So neither recursion nor the number of descriptors limits the depth.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from flowmesh.files.beneath import FOLDER, open_beneath

_Identity = tuple[int, int]


class Moved(OSError):
    """Raised when a folder was moved while we were below it: the way back is lost."""


class Descent:
    """Starts at `top`. Use it as a context manager.

    Args:
        top: a descriptor, which stays the caller's.
        rights: the owner's rights (mode bits) that each folder gets that is ours and lacks them.
    """

    def __init__(self, top: int, rights: int) -> None:
        self.fd = os.open(".", FOLDER, dir_fd=top)
        """The folder where we are."""
        self.names: list[str] = []
        """The way from the top to it."""
        self._rights = rights
        self._above: list[_Identity] = []
        self._parent: int | None = None
        """Kept open, as a folder without the right to search it has no usable `..`."""

    def __enter__(self) -> Descent:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        if self._parent is not None:
            os.close(self._parent)

    def down(self, name: str) -> None:
        """Enter a folder.

        Raises:
            OSError: it cannot be opened, or it is a link, or something is mounted there.
        """
        fd = open_with_rights(self.fd, name, self._rights)
        self._above.append(_identity(self.fd))
        self.names.append(name)
        if self._parent is not None:
            os.close(self._parent)
        self._parent, self.fd = self.fd, fd

    def up(self) -> str:
        """Back to the folder above; returns the name of the one that was left.

        Raises:
            Moved: the folder was moved meanwhile.
            OSError: the folder above cannot be opened.
        """
        if self._parent is not None:
            above = self._parent
            self._parent = None
        else:
            above = os.open("..", FOLDER, dir_fd=self.fd)
        os.close(self.fd)
        self.fd = above
        if _identity(above) != self._above.pop():
            raise Moved(errno.ESTALE, "it was moved meanwhile", self.names[-1])
        return self.names.pop()


def open_with_rights(folder: int, name: str, rights: int) -> int:
    """Open a folder; where it is ours and lacks some of the owner's `rights`, it gets them.

    Raises:
        OSError: as for `open_beneath`.
    """
    try:
        fd = open_beneath(folder, name, FOLDER)
    except PermissionError:
        if not rights:
            raise
        _give_rights_unopened(folder, name, rights)
        fd = open_beneath(folder, name, FOLDER)
    give_rights(fd, rights)
    return fd


def give_rights(folder: int, rights: int) -> None:
    """Add the owner's `rights` to an open folder, if it is ours and lacks them."""
    status = os.fstat(folder)
    if status.st_mode & rights != rights and status.st_uid == os.geteuid():
        with contextlib.suppress(OSError):  # what then fails is reported there
            os.fchmod(folder, stat.S_IMODE(status.st_mode) | rights)


def _give_rights_unopened(folder: int, name: str, rights: int) -> None:
    """Of a folder that we cannot open."""
    handle = open_beneath(folder, name, os.O_PATH | os.O_DIRECTORY)
    try:
        status = os.fstat(handle)
        if status.st_uid == os.geteuid():
            # an O_PATH descriptor knows no fchmod; the link in /proc leads to what is open, not to a name
            os.chmod(f"/proc/self/fd/{handle}", stat.S_IMODE(status.st_mode) | rights)  # noqa: PTH101
    finally:
        os.close(handle)


def _identity(fd: int) -> _Identity:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
