"""Collects what `spec.outputs` names into the task's artifacts, which are delivered."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flowmesh.files.folder import Folder
from flowmesh.files.walk import Troubles
from runners.api import Context, RunnerError

MOST_LISTED = 1000


class Missing(RunnerError):
    """A pattern of `spec.outputs` matches nothing, although the program succeeded."""

    says_all = True


def collect(ctx: Context, folder: Path, patterns: Sequence[str], *, strict: bool) -> list[dict[str, Any]]:
    """Bring the files that match into the artifacts, under their names in `folder`.

    Args:
        strict: whether a pattern has to match something.

    Returns:
        of each file its path below the artifacts and its bytes; the first MOST_LISTED.

    Raises:
        Missing: with `strict`.
        OSError: a file cannot be read or written.
    """
    found: dict[str, Path] = {}
    for i, pattern in enumerate(patterns):
        matched = sorted(glob.glob(pattern, root_dir=folder, recursive=True, include_hidden=True))  # noqa: PTH207
        if strict and not matched:
            raise Missing(f"spec.outputs[{i}]: the program succeeded, and nothing matches {pattern!r} in {folder}")
        for name in matched:
            found |= _files(folder, name)
    listed: list[dict[str, Any]] = []
    for name, path in found.items():
        target = ctx.artifacts_dir / name
        _bring(path, target)
        if len(listed) < MOST_LISTED:
            listed.append({"path": name, "bytes": target.stat().st_size})
    if len(found) > MOST_LISTED:
        ctx.log.warning("outputs: %d files; the result lists the first %d", len(found), MOST_LISTED)
    return listed


def _files(folder: Path, name: str) -> dict[str, Path]:
    """A file by itself, or all regular files of a folder."""
    path = folder / name
    if path.is_file():
        return {name: path}
    return {f"{name.rstrip('/')}/{inside}": path / inside for inside in _below(path)}


def _below(path: Path) -> Iterator[str]:
    if path.is_symlink() or not path.is_dir():
        return
    troubles = Troubles()
    with Folder(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW), path) as folder:
        yield from [entry.path for entry in folder.entries(troubles, ordered=True) if entry.is_file]
    troubles.check()


def _bring(path: Path, target: Path) -> None:
    """As a second name of the file, where that is possible; else as a copy. A link counts as what it leads to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if not path.is_symlink():
        with contextlib.suppress(OSError):
            os.link(path, target)
            return
    shutil.copyfile(path, target)
