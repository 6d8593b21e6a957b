"""Free disk space, as far as an ordinary user may use it. File systems are asked in a thread."""

from __future__ import annotations

import os
from pathlib import Path

_MIB = 1 << 20


def shortage(folders: dict[str, Path], least_bytes: int) -> str:
    """Which of these folders has too little space, and how much it has; empty if all have enough.

    Args:
        folders: by the setting or field that names them.
        least_bytes: 0: all have enough.
    """
    for key, folder in folders.items() if least_bytes else ():
        free_bytes = free_bytes_at(folder)
        if free_bytes is not None and free_bytes < least_bytes:
            return (
                f"{folder} ({key}) has {free_bytes / _MIB:.0f} MiB free, "
                f"less than the {least_bytes / _MIB:.0f} MiB of results.min_free_bytes"
            )
    return ""


def free_bytes_at(folder: Path) -> int | None:
    """What an ordinary user may still write to a folder, or to the file system it will be made on; None: unknown."""
    for place in (folder, *folder.parents):
        try:
            found = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return found.f_bavail * found.f_frsize
    return None
