"""Private temporary folders of `flowmesh run`: created, locked while in use, removed once abandoned."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from flowmesh.files.removal import remove_path
from flowmesh.processes import linux

RUN_PREFIX = "flowmesh-run-"
ENVIRONMENT_CHARS = 32
"""Reserved for the name of an environment, which is part of the names of its fork servers' sockets."""


def private_dir(prefix: str) -> Path:
    """Create a folder that only this user can enter, with a path short enough for unix sockets below it."""
    where = tempfile.gettempdir()
    longest = f"/xxxxxxxx/state/run/{'x' * ENVIRONMENT_CHARS}-xxxxxxxx.sock"
    room = linux.MAX_SOCKET_PATH - len(prefix) - len(longest)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=where if len(os.fsencode(where)) <= room else "/tmp"))


def lock_folder(folder: Path, *, create: bool = True) -> int:
    """Lock a folder for as long as the returned descriptor, or an inherited copy of it, is open.

    Raises:
        OSError: another process holds the lock; or there is no lock file and `create` is False.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def sweep_abandoned(prefix: str, root: Path | None = None) -> None:
    """Remove the folders of commands that were killed: those of this user that nobody holds locked.

    Args:
        prefix: of their names, as for `private_dir`.
        root: where to look; None: the temporary folders.
    """
    for where in {root} if root is not None else {Path(tempfile.gettempdir()), Path("/tmp")}:
        for folder in where.glob(f"{prefix}*"):
            try:
                if folder.is_symlink() or folder.lstat().st_uid != os.geteuid():
                    continue
                lock = lock_folder(folder, create=False)
            except OSError:  # in use, or not such a folder
                continue
            remove_path(folder)
            os.close(lock)
