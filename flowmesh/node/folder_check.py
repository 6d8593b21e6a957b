"""Whether one of the node's folders can still be used: it is there, on the file system it was on, and can be written.

Blocks on the file system: call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from loguru import logger

LEAST_INODES = 16
"""A task makes about ten files and folders before it runs."""
MOUNTS = Path("/proc/self/mountinfo")
ACCEPT_FILE = ".flowmesh-accept"
"""Made in the folder by an operator who says that it may be used although another file system was mounted there."""


class CheckedFolder:
    """
    Args:
        key: the setting that names it, for the messages.
        path: absolute. It exists.
        mount: the mount point of the file system that it was on before; None: the one that it is on now.
    """

    def __init__(self, key: str, path: Path, mount: Path | None = None) -> None:
        self.key = key
        self.path = path
        self._identity = _identity(path) if mount is None else None
        self._mount = mount or mount_of(path)

    @property
    def mount(self) -> Path:
        """The mount point of the file system that it has to be on."""
        return self._mount

    @property
    def device(self) -> int | None:
        """The number of the file system that it was found on last; None: it was not looked at yet."""
        return None if self._identity is None else self._identity[0]

    def trouble(self, *, write: bool = False) -> str:
        """Why the folder cannot be used; empty: it can. A missing one is made, unless its file system is not mounted.

        Args:
            write: write a small file, too.
        """
        try:
            return self._trouble(write)
        except OSError as error:
            return self._says(f"cannot be used: {error.strerror or error}")

    def _trouble(self, write: bool) -> str:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            if self._is_unmounted():
                return self._unmounted()
            Path(os.path.realpath(self.path)).mkdir(parents=True)  # it may be a link to a folder that is gone
            logger.bind(path=str(self.path)).warning("{} was gone: made again", self.key)
            status = self.path.stat()
        if not stat.S_ISDIR(status.st_mode):
            return self._says("is not a folder any more; move away what is there")
        if (status.st_dev, status.st_ino) != self._identity:
            if self._is_unmounted() and not self._is_accepted():
                return self._unmounted()
            self._identity, self._mount = (status.st_dev, status.st_ino), mount_of(self.path)
        found = os.statvfs(self.path)
        if found.f_flag & os.ST_RDONLY:
            return self._says("is on a file system that is read-only")
        few = found.f_files > 0 and found.f_favail < LEAST_INODES
        if few and (found.f_ffree or self._write()):  # some file systems count none at all
            return self._says(f"is on a file system with {found.f_favail} free inodes; remove files there")
        if not os.access(self.path, os.W_OK | os.X_OK):
            return self._says("cannot be written by this user")
        return self._write() if write else ""

    def _write(self) -> str:
        probe = self.path / f".flowmesh-probe-{secrets.token_hex(4)}"
        try:
            with open(probe, "xb", buffering=0) as file:
                file.write(b"x")
        except OSError as error:
            return self._says(f"cannot be written: {error.strerror}")
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
        return ""

    def _is_unmounted(self) -> bool:
        """Whether the file system that it was on is not mounted there; one that was mounted over it is as good."""
        now = mount_of(self.path)
        return now != self._mount and now in self._mount.parents

    def _is_accepted(self) -> bool:
        """Whether an operator has said that the folder may be used where it is now."""
        try:
            (self.path / ACCEPT_FILE).unlink()
        except OSError:
            return False
        logger.bind(path=str(self.path)).warning("{} is used without the file system at {}", self.key, self._mount)
        return True

    def _unmounted(self) -> str:
        return self._says(
            f"was on the file system mounted at {self._mount}, which is not mounted; mount it again, or make the file "
            f"{ACCEPT_FILE} in the folder to use it as it is"
        )

    def _says(self, what: str) -> str:
        return f"{self.path} ({self.key}) {what}"


def mount_of(path: Path) -> Path:
    """The mount point of the file system that a path is on, or would be on once it exists."""
    real = Path(os.path.realpath(path))
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return Path("/")
    points = {_unescape(line.split(" ", 5)[4]) for line in lines if line}
    return next((each for each in (real, *real.parents) if str(each) in points), Path("/"))


def _unescape(word: str) -> str:
    """Mount points have spaces, tabs, newlines and backslashes as octal escapes."""
    for escape, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        word = word.replace(escape, character)
    return word


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
