"""The node's folders: made, looked at, and held against a second supervisor."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from flowmesh.errors import BusyError, ConfigError
from flowmesh.processes import linux
from flowmesh.processes.server_client import socket_name
from flowmesh.tasks.journal import JournalError, ensure_private_dir
from flowmesh.tasks.types import DEFAULT, DELIVERY, LIGHT

PARTS = ("run", "log", "spool", "tmp", "cache")


def check_sockets(folder: Path, environments: Iterable[str]) -> None:
    """Whether the fork servers of all environments can have their sockets below the node's own folder.

    Raises:
        ConfigError: its path is too long; says how long it may be.
    """
    longest = max((LIGHT, DEFAULT, DELIVERY, *environments), key=len)
    room = linux.MAX_SOCKET_PATH - len(f"/run/{socket_name(longest)}")
    if (length := len(os.fsencode(folder))) > room:
        raise ConfigError(
            f"node.state_dir: {folder} has {length} bytes, and the unix sockets in it, such as that of environment "
            f"{longest!r}, leave its path {max(room, 0)}; set node.state_dir to a shorter path"
        )


def hold_state_dir(folder: Path) -> IO[str]:
    """Make the node's own folder with its parts, and hold it for as long as the file that is returned is open.

    Raises:
        BusyError: another supervisor holds it.
        JournalError: it cannot be made or written.
    """
    ensure_private_dir(folder)
    try:
        for name in PARTS:
            (folder / name).mkdir(exist_ok=True, mode=0o700)
        lock = open(folder / "lock", "a+")  # noqa: SIM115 - held for the whole life
    except OSError as error:
        raise JournalError(
            f"{error.filename}: {error.strerror}; set node.state_dir to a folder that can be written"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "?"
        lock.close()
        raise BusyError(
            f"{folder}: another supervisor (pid {holder}) uses this folder; stop it, or set node.state_dir to another"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def make_results_dir(folder: Path) -> None:
    """Make RESULTS_DIR, where it is not there.

    Raises:
        ConfigError: it cannot be made, or not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"results.dir: {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"results.dir: {folder} cannot be written by this user")


def make_log_file(path: Path) -> None:
    """Make the node's own log file, where it is not there, with its folder.

    Raises:
        ConfigError: it cannot be made, or not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"node.log_file: {path} cannot be opened: {why}; set it to a file that can be written"
        ) from None


def open_for(uid: int, gid: int, folder: Path) -> None:
    """Let the user that tasks run as pass through to its own folders, and list none."""
    for each in (folder, folder / "spool", folder / "tmp"):
        each.chmod(0o711)
    os.chown(folder / "cache", uid, gid)
