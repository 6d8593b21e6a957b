"""Shared memory of tasks: a private /dev/shm for each if the system allows it, else removal of what they left."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flowmesh.files.removal import remove_path
from flowmesh.processes import linux, proc_files

SHM = Path("/dev/shm")
_LEFT_BY_LIBRARIES = re.compile(
    r"psm_\w+|torch_\w+|vllm\w*|sem\.\w+|nccl-\w+|cuda\.shm\..*|__KMP_REGISTERED_LIB_.*|wnsm_\w+"
)
"""Names of blocks that multiprocessing, torch, vLLM, NCCL, CUDA and OpenMP create."""


def would_hide(*folders: str | Path) -> bool:
    """Whether one of these folders is in the machine's /dev/shm: a task with a private /dev/shm would not see it."""
    return any(Path(folder).resolve().is_relative_to(SHM.resolve()) for folder in folders)


def make_private() -> bool:
    """Give the calling process and its later children an empty /dev/shm. False if the system does not allow it."""
    try:
        linux.unshare_mounts()
        linux.mount_tmpfs(str(SHM))
    except OSError:
        return False
    return True


def sweep(since: float, uid: int) -> list[str]:
    """Remove a user's blocks that match the libraries' names, if no process has them mapped or open.

    A block of another program that matches stays for as long as a process uses it.

    Args:
        since: seconds since the epoch; blocks with an older ctime stay.
        uid: whose blocks.

    Returns:
        the names of the removed blocks.
    """
    found = []
    try:
        entries = list(os.scandir(SHM))
    except OSError:
        return []
    for entry in entries:
        if _LEFT_BY_LIBRARIES.fullmatch(entry.name):
            try:
                stat = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if stat.st_uid == uid and stat.st_ctime >= since:
                found.append(entry.name)
    if not found:
        return []
    used = _used()
    return [name for name in found if name not in used and not remove_path(SHM / name)]


def _used() -> set[str]:
    """Names in /dev/shm that some process has mapped or open."""
    prefix = f"{SHM}/"
    names: set[str] = set()
    for pid in proc_files.all_pids():
        try:
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
            links = [str(Path(f"/proc/{pid}/fd", fd).readlink()) for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        texts = [line.rpartition(" ")[2] for line in maps.splitlines() if prefix in line] + links
        names |= {text.removeprefix(prefix) for text in texts if text.startswith(prefix)}
    return names
