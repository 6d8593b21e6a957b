"""Shared memory that tasks leave behind: a /dev/shm of their own where that is allowed, else a sweep after them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flowmesh.processes import linux

SHM = Path("/dev/shm")
_LEFT_BY_LIBRARIES = re.compile(
    r"psm_\w+|torch_\w+|vllm\w*|sem\.\w+|nccl-\w+|cuda\.shm\..*|__KMP_REGISTERED_LIB_.*|wnsm_\w+"
)
"""Names that multiprocessing, torch, vLLM, NCCL, CUDA and OpenMP give."""


def would_hide(*folders: str | Path) -> bool:
    """Whether one of these lies in the machine's /dev/shm: a task with one of its own would not find it."""
    return any(Path(folder).resolve().is_relative_to(SHM.resolve()) for folder in folders)


def make_private() -> bool:
    """Give the calling process, and all that it will start, an empty /dev/shm. False where that is not allowed."""
    try:
        linux.unshare_mounts()
        linux.mount_tmpfs(str(SHM))
    except OSError:
        return False
    return True


def sweep(since: float) -> list[str]:
    """Remove blocks that libraries made since `since` (seconds of the epoch) and that no process has mapped or open.

    Another program's block of the same name pattern stays for as long as anything uses it.
    """
    mine = os.geteuid()
    found = []
    try:
        entries = list(os.scandir(SHM))
    except OSError:
        return []
    for entry in entries:
        if _LEFT_BY_LIBRARIES.fullmatch(entry.name):
            try:
                stat = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.st_uid == mine and stat.st_ctime >= since:
                found.append(entry.name)
    if not found:
        return []
    used = _used()
    removed = [name for name in found if name not in used]
    for name in removed:
        (SHM / name).unlink(missing_ok=True)
    return removed


def _used() -> set[str]:
    """Names below /dev/shm that a process has mapped or open."""
    prefix = f"{SHM}/"
    names: set[str] = set()
    for pid in linux.all_pids():
        try:
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
            links = [str(Path(f"/proc/{pid}/fd", fd).readlink()) for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        texts = [line.rpartition(" ")[2] for line in maps.splitlines() if prefix in line] + links
        names |= {text.removeprefix(prefix) for text in texts if text.startswith(prefix)}
    return names
