"""A task's logs: bounded while it runs, folded when it has ended, and read for its verdict.

A task can replace any of them by a link or a pipe at any time, and the node may be root. So each folder and file is
opened once, without following links, and then used by its descriptor only.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from loguru import logger

from flowmesh.processes.safe_folder import open_folder
from flowmesh.results.safe_files import open_regular

KEPT_OF_LOG = 4
"""A log that grew too large keeps its last quarter."""
MAX_FOLDED_BYTES = 8 * 1024**2
"""A larger log is not folded: that would take as much memory."""
TAIL_BYTES = 64 * 1024
MOST_LOGGED = 10
"""Of a round's errors: a task can cause any number."""
_APPEND = os.O_RDWR | os.O_APPEND


def log_files(logs: Path, troubles: dict[Path, OSError]) -> Iterator[tuple[int, Path]]:
    """Every log file below a task's `logs`, with a descriptor of its folder.

    Args:
        troubles: gets the folders that cannot be read, and why.
    """
    open_ = [logs]
    while open_:
        at = open_.pop()
        try:
            folder = open_folder(at)
        except FileNotFoundError:
            continue
        except OSError as error:
            troubles[at] = error
            continue
        try:
            with os.scandir(folder) as entries:
                found = list(entries)
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    open_.append(at / entry.name)
                elif entry.name.endswith(".log") and entry.is_file(follow_symlinks=False):
                    yield folder, at / entry.name
        except OSError as error:
            troubles[at] = error
        finally:
            os.close(folder)


def bound_logs(folders: list[Path], limit_bytes: int) -> dict[Path, OSError]:
    """Cut each log file that is over the limit down to its last part. Lines written meanwhile may be lost.

    Returns:
        files and folders that could not be bounded, and why: a task can make them unreadable.
    """
    troubles: dict[Path, OSError] = {}
    for logs in folders:
        for folder, path in log_files(logs, troubles):
            try:
                if os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_size > limit_bytes:
                    _cut(folder, path.name, limit_bytes)
            except FileNotFoundError:  # removed meanwhile
                continue
            except OSError as error:
                troubles[path] = error
    return troubles


def _cut(folder: int, name: str, limit_bytes: int) -> None:
    with open(open_regular(name, _APPEND, folder=folder), "a+b") as file:
        size, kept_bytes = file.seek(0, os.SEEK_END), limit_bytes // KEPT_OF_LOG
        if size <= limit_bytes:  # replaced meanwhile
            return
        file.seek(size - kept_bytes)
        tail = file.read(kept_bytes)
        file.truncate(0)
        # appended: the task appends too, and its next line comes after these
        file.write(f"[flowmesh: {size - kept_bytes} bytes of this log were dropped here]\n".encode() + tail)


def finish_logs(out_dir: Path, *, keep: bool) -> None:
    """Drop the parts of lines that progress bars overwrote; without `keep`, remove the logs."""
    troubles: dict[Path, OSError] = {}
    for folder, path in log_files(out_dir / "logs", troubles):
        try:
            if not keep:
                os.unlink(path.name, dir_fd=folder)
            elif 0 < os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_size <= MAX_FOLDED_BYTES:
                _fold(folder, path.name)
        except OSError as error:
            troubles[path] = error
    log_troubles(troubles)


def _fold(folder: int, name: str) -> None:
    with open(open_regular(name, _APPEND, folder=folder), "a+b") as file:
        file.seek(0)
        data = file.read(MAX_FOLDED_BYTES + 1)
        if len(data) <= MAX_FOLDED_BYTES and b"\r" in data.replace(b"\r\n", b"\n"):
            file.truncate(0)
            file.write(b"\n".join(line.rstrip(b"\r").rsplit(b"\r", 1)[-1] for line in data.split(b"\n")))


def log_troubles(troubles: Mapping[Path, OSError]) -> None:
    """Warn of logs that could not be bounded or folded; the task is not affected."""
    for path, error in itertools.islice(troubles.items(), MOST_LOGGED):
        logger.bind(path=str(path)).warning("a task's log could not be bounded or folded: {}", error.strerror or error)
    if len(troubles) > MOST_LOGGED:
        logger.warning("{} more logs could not be bounded or folded", len(troubles) - MOST_LOGGED)


def log_tail(out_dir: Path, limit_bytes: int = TAIL_BYTES) -> str:
    """The last of what a task wrote: stderr, or stdout where stderr is empty; carriage returns folded."""
    try:
        folder = open_folder(out_dir / "logs")
    except OSError:
        return ""
    try:
        for name in ("stderr.log", "stdout.log"):
            text = _tail(folder, name, limit_bytes)
            if text.strip():
                lines = text.removesuffix("\n").split("\n")
                return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines)
    finally:
        os.close(folder)
    return ""


def _tail(folder: int, name: str, limit_bytes: int) -> str:
    try:
        with open(open_regular(name, folder=folder), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - limit_bytes))
            return file.read(limit_bytes).decode("utf-8", "replace")
    except OSError:  # there is none, or a link
        return ""
