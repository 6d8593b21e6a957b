"""Opens folders without following symbolic links.

A task may replace a folder by a link after its path was checked. Work through the descriptor stays in the folder that
was opened.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from flowmesh.files.beneath import FOLDER


def open_folder(path: Path, *, make: bool = False) -> int:
    """Open the folder at `path`; no part of the path may be a link.

    Args:
        path: absolute.
        make: create it and its parents if missing.

    Returns:
        its descriptor, which the caller closes.

    Raises:
        OSError: it is missing or cannot be created, or a part of the path is a link.
    """
    try:
        folder = os.open(path, FOLDER)
    except FileNotFoundError:
        if not make:
            raise
        return _make_folder(path)
    except NotADirectoryError:
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory, or a link to one; remove it", str(path)) from None
    real = os.readlink(f"/proc/self/fd/{folder}")  # noqa: PTH115 - of the open folder: a later change cannot affect it
    if real != str(path):
        os.close(folder)
        raise OSError(errno.ELOOP, f"a link leads from it to {real}; remove that link", str(path))
    return folder


def _make_folder(path: Path) -> int:
    missing: list[str] = []
    at = path
    while True:
        missing.append(at.name)
        at = at.parent
        try:
            folder = open_folder(at)
            break
        except FileNotFoundError:
            if at == at.parent:
                raise
    for name in reversed(missing):
        parent = folder
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=parent)
            folder = os.open(name, FOLDER, dir_fd=parent)
        except OSError as error:
            error.filename = str(path)
            raise
        finally:
            os.close(parent)
    return folder
