"""A task's outputs begin empty: what an earlier attempt left in the task's folder is removed before the next starts."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

from loguru import logger

from flowmesh.files.removal import empty

KEPT = frozenset({"checkpoints", "rows.jsonl"})
"""A new attempt continues from these."""
_OF_A_TASK = frozenset({"logs", "manifest.json", "responses.json"})
"""One of these is in each folder that a task has had. Any other folder is somebody else's, and stays as it is."""
_ASIDE = ".left-"


def empty_outputs(folder: int, path: Path, others: Callable[[], Iterable[Path]], stays: Iterable[str] = ()) -> None:
    """Remove what an earlier attempt left in its folder, except what it continues from.

    What cannot be removed is renamed, so that it is not taken for an output of this attempt.

    Args:
        folder: a descriptor of the folder.
        path: the folder, for messages.
        others: returns folders that stay, such as other tasks' inside this one; called if there is something to remove.
        stays: further names that the task's type continues from.

    Raises:
        OSError: something can be neither removed nor renamed.
    """
    if _OF_A_TASK.isdisjoint(os.listdir(folder)):
        return
    kept = KEPT | set(stays) | {each.relative_to(path).parts[0] for each in others() if path in each.parents}
    left = empty(folder, kept.__contains__)
    for name, remains in left.items():
        if not name.startswith(_ASIDE):
            try:
                os.rename(name, f"{_ASIDE}{secrets.token_hex(4)}", src_dir_fd=folder, dst_dir_fd=folder)
            except OSError as error:
                raise OSError(error.errno or errno.EBUSY, f"an earlier attempt left {remains}", str(path)) from error
    if left:
        logger.bind(path=str(path), count=len(left)).warning(
            "outputs of an earlier attempt could not all be removed: {}", next(iter(left.values()))
        )
