"""Free disk space, as far as an ordinary user may use it. File systems are asked in a thread."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from flowmesh.files.safe_folder import open_folder

_MIB = 1 << 20


def shortage(folders: dict[str, Path], least_bytes: int, *, of_a_task: bool = False) -> str:
    """Which of these folders has too little space, and how much it has; empty if all have enough.

    Args:
        folders: by the setting or field that names them.
        least_bytes: 0: all have enough.
        of_a_task: a task may have written there, so no link is followed.
    """
    for key, folder in folders.items() if least_bytes else ():
        free_bytes = free_bytes_at(folder, of_a_task=of_a_task)
        if free_bytes is not None and free_bytes < least_bytes:
            return (
                f"{folder} ({key}) has {free_bytes / _MIB:.0f} MiB free, "
                f"less than the {least_bytes / _MIB:.0f} MiB of results.min_free_bytes"
            )
    return ""


def free_bytes_at(folder: Path, *, of_a_task: bool = False) -> int | None:
    """What an ordinary user may still write to a folder, or to the file system it will be made on; None: unknown.

    Args:
        of_a_task: follow no link, wherever in the path.
    """
    for place in itertools.chain((folder,), folder.parents):
        try:
            found = _of_open(place) if of_a_task else os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return found.f_bavail * found.f_frsize
    return None


def _of_open(place: Path) -> os.statvfs_result:
    folder = open_folder(place)
    try:
        return os.statvfs(folder)
    finally:
        os.close(folder)
