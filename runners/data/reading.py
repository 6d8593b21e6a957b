"""What a task's document may read. Every path that it names goes through here.

A path is opened without reading (`O_PATH`), judged by where it leads, links included, and read through the same
descriptor. So nothing can be exchanged between the judgement and the reading. Libraries that take a folder get it after
all of its links were judged.
"""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from flowmesh.messages.job import Job

KERNEL = ("/proc", "/sys", "/dev", "/run")
"""Folders of the system that hold processes, devices and sockets. A root inside one opens it, one above does not."""
_NO_DATA = frozenset({0x9FA0, 0x62656572, 0x1CD1, 0x27E0EB, 0x63677270, 0x64626720, 0x74726163, 0x73636673, 0x6E736673})
"""Types of file systems without files of data, wherever they are mounted: proc, sysfs, devpts, cgroup, cgroup2,
debugfs, tracefs, securityfs, nsfs."""
_libc = ctypes.CDLL(None, use_errno=True)


class Refused(PermissionError):
    """A path leads outside of what documents may read. The message does not tell whether anything is there."""


class Reach(msgspec.Struct, frozen=True):
    """The folders that one task's document may read."""

    roots: tuple[str, ...]
    """Resolved; `*` for one part of a path."""
    hidden: tuple[str, ...]
    """Taken out of the roots, except for roots that lie inside."""
    own_user: bool

    @classmethod
    def of(cls, job: Job) -> Reach:
        permits = job.permits
        own = [job.results_dir, job.out_dir, job.cache_dir, job.tmp_dir, *job.child_dirs.values(), *permits.caches]
        roots = [_resolved(glob.escape(path)) for path in own if path]
        roots += map(_resolved, permits.read_roots)
        hidden = [*KERNEL, *(os.path.realpath(path) for path in permits.hidden)]
        return cls(tuple(["/"] if permits.own_user else []) + tuple(roots), tuple(hidden), permits.own_user)

    def covers(self, path: str) -> bool:
        """Whether a resolved path may be read: it lies in a root, deeper than in any hidden folder."""
        parts = _parts(path)
        inside = max((_depth(root, parts) for root in self.roots), default=-1)
        taken = max((_depth(glob.escape(folder), parts) for folder in self.hidden), default=-1)
        return inside >= 0 and (taken < 0 or inside > taken)

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[Path]:
        """A name of the file or folder at `path` that leads to the judged one, whatever happens to `path` meanwhile.

        Raises:
            Refused: it leads outside, or is neither a file nor a folder.
            OSError: there is nothing, or it cannot be read.
        """
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            if not self._would_cover(path):
                raise Refused(self.words()) from None
            raise error if isinstance(error, OSError) else FileNotFoundError(str(error)) from None
        try:
            self._judge(handle)
            yield Path(f"/proc/self/fd/{handle}")
        finally:
            os.close(handle)

    def find(self, path: Path) -> Path | None:
        """Where `path` leads, links resolved; None: there is nothing.

        Raises:
            Refused: outside, or neither a file nor a folder.
        """
        try:
            with self.opened(path) as name:
                return name.readlink()
        except Refused:
            raise
        except OSError:
            return None

    def read_bytes(self, path: Path) -> bytes:
        """The content of a file. Errors as for `opened`."""
        with self.opened(path) as name:
            return name.read_bytes()

    def check_folder(self, folder: Path, stopped: object = None) -> None:
        """Judge everything that a library can reach by names inside `folder`: links lead where they may.

        Not `files.walk`: it follows links and crosses mounts on purpose, as a library would, and judges where each
        leads. It changes nothing; the kernel's bound on a path's length bounds its depth.

        Args:
            stopped: called for each folder, to raise if the task is asked to stop.

        Raises:
            Refused: naming the entry that leads outside, or that is neither a file nor a folder.
        """
        seen: set[tuple[int, int]] = set()
        todo = [(folder, "")]
        while todo:
            path, shown = todo.pop()
            if callable(stopped):
                stopped()
            try:
                with self.opened(path) as name:
                    status = name.stat()
                    if (status.st_dev, status.st_ino) in seen or not stat.S_ISDIR(status.st_mode):
                        continue
                    seen.add((status.st_dev, status.st_ino))
                    with os.scandir(name) as entries:
                        found = sorted((entry.name, _kind(entry)) for entry in entries)
            except Refused:
                raise Refused(f"holds {shown or '.'!r}, which {self.words()}") from None
            except OSError:
                continue  # cannot be read, so no library can
            for entry, kind in found:
                inside = f"{shown}/{entry}" if shown else entry
                if kind in ("link", "folder"):
                    todo.append((path / entry, inside))
                elif kind == "other":
                    raise Refused(f"holds {inside!r}, which is neither a file nor a folder")

    def words(self) -> str:
        """What is wrong with a path outside, and how the operator can change it."""
        if self.own_user:
            return "lies where no task may read: in the system's folders or the node's own"
        return (
            "lies outside of the folders that tasks of this node may read; its setting tasks.read_roots names more "
            "(flowmesh run: --read-root)"
        )

    def _would_cover(self, path: Path) -> bool:
        """Whether a path that cannot be opened leads where something may be read."""
        try:
            return self.covers(os.path.realpath(path))
        except (OSError, ValueError):  # a link that may not be read
            return False

    def _judge(self, handle: int) -> None:
        status = os.fstat(handle)
        where = str(Path(f"/proc/self/fd/{handle}").readlink())
        deleted = status.st_nlink == 0 or not where.startswith("/")  # has no place that could be judged
        if deleted or not self.covers(where) or _type_of_file_system(handle) in _NO_DATA:
            raise Refused(self.words())
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise Refused("is neither a file nor a folder")


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "link"
    return (
        "folder" if entry.is_dir(follow_symlinks=False) else "file" if entry.is_file(follow_symlinks=False) else "other"
    )


def _type_of_file_system(handle: int) -> int:
    """`f_type` of statfs(2), its first word."""
    answer = (ctypes.c_long * 64)()
    if _libc.fstatfs(handle, ctypes.byref(answer)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(answer[0]) & 0xFFFFFFFF


def _resolved(pattern: str) -> str:
    """A root with the links before its first wildcard resolved. What a wildcard matches is never followed."""
    parts = _parts(pattern)
    plain = next((at for at, part in enumerate(parts) if glob.has_magic(_unescaped(part)[1])), len(parts))
    start = os.path.realpath("/" + "/".join(_unescaped(part)[0] for part in parts[:plain]))
    return "/".join([glob.escape(start.rstrip("/")), *parts[plain:]]) or "/"


def _unescaped(part: str) -> tuple[str, str]:
    """A part of an escaped path as it is, and what of it is a real wildcard."""
    name = part.replace("[*]", "*").replace("[?]", "?").replace("[[]", "[")
    return name, part.replace("[*]", "").replace("[?]", "").replace("[[]", "")


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _depth(pattern: str, parts: list[str]) -> int:
    """The number of parts of a pattern that holds the path; -1: it does not."""
    wanted = _parts(pattern)
    fits = len(wanted) <= len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted))
    return len(wanted) if fits else -1
