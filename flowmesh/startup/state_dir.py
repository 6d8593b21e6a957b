"""The node's folders: creates and checks them, and locks the state folder against a second supervisor."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from flowmesh.errors import BusyError, ConfigError
from flowmesh.execution.layout import make_parts
from flowmesh.processes import linux
from flowmesh.processes.server_client import socket_name
from flowmesh.tasks.catalogue import DEFAULT, DELIVERY, LIGHT
from flowmesh.tasks.journal import ensure_private_dir

_OF_A_DISK = frozenset(
    {
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.ENODEV,
        errno.ENXIO,
    }
)


def check_sockets(folder: Path, environments: Iterable[str]) -> None:
    """Check that the sockets of all environments' fork servers fit below the state folder.

    Args:
        folder: the state folder.
        environments: names of the configured environments.

    Raises:
        ConfigError: the folder's path is too long; names the limit in bytes.
    """
    longest = max((LIGHT, DEFAULT, DELIVERY, *environments), key=len)
    room = linux.MAX_SOCKET_PATH - len(f"/run/{socket_name(longest)}")
    if (length := len(os.fsencode(folder))) > room:
        raise ConfigError(
            f"node.state_dir: {folder} has {length} bytes; at most {max(room, 0)} fit, because of the unix sockets in "
            f"it, such as that of environment {longest!r}; set node.state_dir to a shorter path"
        )


def hold_state_dir(folder: Path) -> IO[str]:
    """Create the state folder with its parts, and lock it.

    Returns:
        the lock file; the lock is held until it is closed.

    Raises:
        ConfigError, JournalError: the folder cannot be created or written to.
        BusyError: its disk is read-only, full or broken now; or another supervisor has the lock.
    """
    ensure_private_dir(folder)
    try:
        make_parts(folder, None)
        return _lock(folder)
    except OSError as error:
        raise _unusable("node.state_dir", Path(error.filename or folder), error) from error


def _lock(folder: Path) -> IO[str]:
    lock = open(folder / "lock", "a+")  # noqa: SIM115 - open as long as the node runs
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


def keep_lock(folder: Path, lock: IO[str]) -> IO[str]:
    """The lock on the state folder, taken again in a new file where somebody has deleted the old one.

    Raises:
        OSError: the file cannot be made.
        BusyError: another supervisor has the new one.
    """
    try:
        if os.fstat(lock.fileno()).st_ino == (folder / "lock").stat().st_ino:
            return lock
    except FileNotFoundError:
        pass
    fresh = _lock(folder)
    lock.close()
    return fresh


def make_results_dir(folder: Path) -> None:
    """Create RESULTS_DIR if it is missing.

    Raises:
        ConfigError: it cannot be created or written to.
        BusyError: its disk is read-only, full or broken now.
    """
    try:
        Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)  # a link may lead to a folder that is gone
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    except OSError as error:
        raise _unusable("results.dir", folder, error) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(
            f"results.dir: {folder} cannot be written by this user; give it the right, or set another folder"
        )


def _unusable(
    key: str, path: Path, error: OSError, verb: str = "used", what: str = "folder"
) -> ConfigError | BusyError:
    """A fault of the disk may pass: the service manager is to start the node again. Any other is the setting's."""
    why = (error.strerror or str(error)).lower()
    if isinstance(error, FileExistsError | NotADirectoryError):
        at = path if error.filename is None else Path(error.filename)
        why = "it is not a folder" if at == path else f"{at} is not a folder"
    if error.errno in _OF_A_DISK:
        return BusyError(f"{key}: {path} cannot be {verb} now: {why}; repair or free its disk, or set another {what}")
    return ConfigError(f"{key}: {path} cannot be {verb}: {why}; set it to a {what} that can be written")


def make_log_file(path: Path) -> None:
    """Create the node's log file and its folder if they are missing.

    Raises:
        ConfigError: it cannot be created or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a pipe without a reader, or a device that does not answer, must not keep the start waiting
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o666))
    except OSError as error:
        raise _unusable("node.log_file", path, error, "opened", "file") from None
