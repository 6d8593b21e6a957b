"""The log files of a task on this machine. The task can write to their folder, so none of its links is followed."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from flowmesh.errors import FlowMeshError
from flowmesh.files.folder import Folder, open_file

_CHUNK = 1 << 20
_BLOCK = 64 * 1024

Open = Callable[[], IO[bytes]]
"""Opens one log file, or raises OSError."""


class LogFiles:
    """The files `stdout.log` and `stderr.log` in a folder, and in its folders, which are those of ranks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder

    def names(self, only: str | None) -> list[str]:
        """Paths below the folder, such as `stdout.log` or `0/stderr.log`, in the order of ranks.

        Args:
            only: `stdout` or `stderr`; None: both.

        Raises:
            FlowMeshError: a link leads to the folder, or it cannot be read.
        """
        wanted = ("stdout.log", "stderr.log") if only is None else (f"{only}.log",)
        found: list[str] = []
        with self._folder() as folder:
            if folder is None:
                return []
            for name in ("", *os.listdir(folder.fd)):
                with contextlib.suppress(OSError), folder.below([name] if name else []) as inside:
                    there = [each for each in wanted if _is_file(inside, each)]
                    found += [f"{name}/{each}" if name else each for each in there]
        return sorted(found, key=_order)

    def open(self, name: str) -> IO[bytes]:
        """Open one of the names.

        Raises:
            OSError: it is gone, or is now a link, or no file.
        """
        *above, last = name.split("/")
        with self._folder() as folder:
            if folder is None:
                raise FileNotFoundError(name)
            with folder.below(above) as inside:
                return os.fdopen(open_file(inside, last, folder.owner), "rb")

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Folder | None]:
        """None: there is none yet."""
        try:
            folder = Folder.open(self.path)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            raise FlowMeshError(f"the task's logs cannot be read: {self.path}: {error.strerror}") from None
        if os.geteuid() != 0:  # we can open nothing that the caller could not
            folder.owner = os.geteuid()
        with folder:
            yield folder


class Tail:
    """Reads one log file as it grows, in whole lines of bytes.

    Args:
        label: its name in the output.
        last_lines: start with the last lines of the file; None: from its beginning.
    """

    def __init__(self, open_log: Open, label: str, last_lines: int | None) -> None:
        self.label = label
        self._open = open_log
        self._position = 0
        self._inode: int | None = None
        self._rest = b""
        if last_lines is not None:
            with contextlib.suppress(OSError), open_log() as file:
                self._position = start_of_last(file, last_lines)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in the file now, or it is gone."""
        try:
            with self._open() as file:
                return os.fstat(file.fileno()).st_size == 0
        except OSError:
            return True

    def lines(self, *, at_end: bool) -> list[bytes]:
        """The next whole lines; none at the end of the file. With `at_end` also a last line without a line break."""
        try:
            with self._open() as file:
                found = os.fstat(file.fileno())
                if (self._inode is not None and found.st_ino != self._inode) or found.st_size < self._position:
                    self._position, self._rest = 0, b""  # it was rotated or truncated
                self._inode = found.st_ino
                file.seek(self._position)
                while data := file.read(_CHUNK):
                    self._position += len(data)
                    *lines, self._rest = (self._rest + data).split(b"\n")
                    if lines:
                        return lines
        except PermissionError as error:
            raise FlowMeshError(f"the task's log {self.label} cannot be read: {error.strerror}") from None
        except OSError:  # it is gone, or was replaced by a link
            return []
        rest = self._rest
        if not at_end or not rest:
            return []
        self._rest = b""
        return [rest]


def start_of_last(file: IO[bytes], count: int) -> int:
    """The offset of the last `count` lines of a file, in bytes. Reads the file from its end."""
    end = position = file.seek(0, os.SEEK_END)
    wanted = count
    while position > 0 and wanted > 0:
        step = min(_BLOCK, position)
        position -= step
        file.seek(position)
        block = file.read(step)
        at = len(block) - 1 if position + step == end and block.endswith(b"\n") else len(block)
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            wanted -= 1
            if wanted == 0:
                return position + at + 1
    return end if count == 0 else 0


def _is_file(folder: int, name: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(name, dir_fd=folder).st_mode)
    except OSError:
        return False


def _order(path: str) -> tuple[int, str, bool]:
    rank, _, name = path.rpartition("/")
    return (int(rank) if rank.isdecimal() else -1, rank, name == "stderr.log")
