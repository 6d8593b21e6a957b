"""Removes folders that tasks wrote to."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from loguru import logger


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


def remove_tree(path: Path) -> None:
    """Remove a folder of the node's with everything in it. What cannot be removed is logged, and stays."""

    def tell(_function: object, name: str, _info: object) -> None:
        if not os.path.lexists(name):
            return
        logger.bind(path=name).warning("could not be removed")

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=tell)
    else:  # rmtree would open a pipe, and block
        path.unlink(missing_ok=True)
