"""Removes folders of the node's that tasks wrote to. No failure of it ends anything: what is left is logged once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from loguru import logger

from flowmesh.files.names import shown
from flowmesh.files.removal import Left, remove_path


def removed_empty(path: Path, but: Iterable[str] = ()) -> bool:
    """Remove a folder that holds at most these files. Quick enough for the loop.

    Returns:
        False if the folder is still there because it holds more; the named files may be gone then.
    """
    try:
        for name in but:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}/{name}")  # noqa: PTH108
        os.rmdir(path)  # noqa: PTH106
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def remove_tree(path: Path) -> Left:
    """Remove a folder of the node's with everything in it. Blocks.

    Returns:
        what cannot be removed and stays; it is logged in one line.
    """
    left = remove_path(path)
    if left:
        logger.bind(path=shown(str(path))).warning("not all of a folder could be removed: {}", left)
    return left
