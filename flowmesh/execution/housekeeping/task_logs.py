"""A task's logs: bounded while it runs, folded when it has ended, and read for its verdict.

A task can replace any of them by a link or a pipe at any time, and the node may be root. So each folder and file is
opened once, without following links, and then used by its descriptor only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from loguru import logger

from flowmesh.files.folder import Folder, open_file
from flowmesh.files.walk import Entry, Troubles

KEPT_OF_LOG = 4
"""A log that grew too large keeps its last quarter."""
MAX_FOLDED_BYTES = 8 * 1024**2
"""A larger log is not folded: that would take as much memory."""
TAIL_BYTES = 64 * 1024
_APPEND = os.O_RDWR | os.O_APPEND


def log_files(folder: Folder, troubles: Troubles) -> Iterator[Entry]:
    """Every log file below a task's `logs`.

    Args:
        troubles: gets the folders that cannot be read, and why.
    """
    return (each for each in folder.entries(troubles) if each.is_file and each.name.endswith(".log"))


def bound_logs(folders: list[Path], limit_bytes: int) -> dict[Path, Troubles]:
    """Cut each log file that is over the limit down to its last part. Lines written meanwhile may be lost.

    Returns:
        by folder, what could not be bounded, and why: a task can make its logs unreadable.
    """
    found = {}
    for logs in folders:
        troubles = Troubles()
        try:
            with Folder.open(logs) as folder:
                for log in log_files(folder, troubles):
                    if log.status.st_size > limit_bytes:
                        _cut(log, folder.owner, limit_bytes, troubles)
        except FileNotFoundError:
            continue
        except OSError as error:
            troubles.add(error, [])
        if troubles:
            found[logs] = troubles
    return found


def _cut(log: Entry, owner: int, limit_bytes: int, troubles: Troubles) -> None:
    try:
        with open(open_file(log.folder, log.name, owner, _APPEND), "a+b") as file:
            size, kept_bytes = file.seek(0, os.SEEK_END), limit_bytes // KEPT_OF_LOG
            if size <= limit_bytes:  # replaced meanwhile
                return
            file.seek(size - kept_bytes)
            tail = file.read(kept_bytes)
            file.truncate(0)
            # appended: the task appends too, and its next line comes after these
            file.write(f"[flowmesh: {size - kept_bytes} bytes of this log were dropped here]\n".encode() + tail)
    except FileNotFoundError:  # removed meanwhile
        return
    except OSError as error:
        troubles.add(error, [log.name])


def finish_logs(out_dir: Path, *, keep: bool, limit_bytes: int = sys.maxsize) -> None:
    """Bound the logs, and drop the parts of lines that progress bars overwrote; without `keep`, remove them."""
    troubles = Troubles()
    try:
        with Folder.open(out_dir / "logs") as folder:
            for log in log_files(folder, troubles):
                try:
                    if not keep:
                        os.unlink(log.name, dir_fd=log.folder)
                        continue
                    size = log.status.st_size
                    if size > limit_bytes:
                        _cut(log, folder.owner, limit_bytes, troubles)
                        size = limit_bytes // KEPT_OF_LOG
                    if 0 < size <= MAX_FOLDED_BYTES:
                        _fold(log, folder.owner)
                except OSError as error:
                    troubles.add(error, [log.name])
    except FileNotFoundError:
        return
    except OSError as error:
        troubles.add(error, [])
    if troubles:
        log_troubles({out_dir / "logs": troubles})


def _fold(log: Entry, owner: int) -> None:
    with open(open_file(log.folder, log.name, owner, _APPEND), "a+b") as file:
        file.seek(0)
        data = file.read(MAX_FOLDED_BYTES + 1)
        if len(data) <= MAX_FOLDED_BYTES and b"\r" in data.replace(b"\r\n", b"\n"):
            file.truncate(0)
            file.write(b"\n".join(line.rstrip(b"\r").rsplit(b"\r", 1)[-1] for line in data.split(b"\n")))


def log_troubles(found: Mapping[Path, Troubles]) -> None:
    """Warn of logs that could not be bounded or folded, in one line a task; the task is not affected."""
    for logs, troubles in found.items():
        logger.bind(path=str(logs)).warning("a task's logs could not all be bounded or folded: {}", troubles)


def log_tail(out_dir: Path, limit_bytes: int = TAIL_BYTES) -> str:
    """The last of what a task wrote: stderr, or stdout where stderr is empty; carriage returns folded."""
    try:
        with Folder.open(out_dir / "logs") as folder:
            for name in ("stderr.log", "stdout.log"):
                text = _tail(folder, name, limit_bytes)
                if text.strip():
                    lines = text.removesuffix("\n").split("\n")
                    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines)
    except OSError:
        pass
    return ""


def _tail(folder: Folder, name: str, limit_bytes: int) -> str:
    try:
        with open(folder.open_file((name,)), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - limit_bytes))
            return file.read(limit_bytes).decode("utf-8", "replace")
    except OSError:  # there is none, or a link
        return ""
