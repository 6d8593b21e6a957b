"""Untrusted names: which of them may become a folder, a file or part of a URL.

No accepted name leads out of the folder it is meant for, by `..` or by a symbolic link.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from flowmesh.errors import FieldError
from flowmesh.messages.output import LocalDestination, Output
from flowmesh.messages.wire import TASK_ID

MAX_NAME_BYTES = 255


def check_task_id(task_id: str, where: str = "task_id") -> str:
    """`task_id` itself, where it can name a folder.

    Raises:
        FieldError: it cannot.
    """
    if not TASK_ID.fullmatch(task_id):
        shown = task_id if len(task_id) <= 80 else f"{task_id[:79]}…"
        raise FieldError(
            f"{where}: invalid task id {shown!r}; use 1 to 200 of A-Z a-z 0-9 . _ : @ = + -, "
            "the first of them none of . - :",
            where,
        )
    return task_id


def is_plain_name(name: str) -> bool:
    """Whether `name` is a plain file name on any system: no path separator, no control character, not too long."""
    return (
        name not in {"", ".", ".."}
        and not any(c in "/\\" or ord(c) < 0x20 or ord(c) == 0x7F for c in name)
        and len(name.encode("utf-8", "surrogateescape")) <= MAX_NAME_BYTES
    )


def within(path: Path, folder: Path) -> Path | None:
    """`path` with symbolic links resolved, if that is `folder` or below it; else None."""
    real = _real(path)
    return real if real is not None and real.is_relative_to(folder.resolve()) else None


def _real(path: Path) -> Path | None:
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return None
    if sys.version_info >= (3, 13) and any(part.is_symlink() for part in (real, *real.parents)):
        return None  # there, a loop is left as it is
    return real


class OutsideError(FieldError):
    """Raised for a path that lies outside of the folders that tasks may write to."""


def placed(
    results_dir: Path, allowed_roots: Iterable[str | Path], task_id: str, output: Output, *, refuse: bool
) -> tuple[Path, str]:
    """The folder of a task, and a warning if it is not where the task asks: then it is the one in RESULTS_DIR.

    Args:
        refuse: a path outside is an error (`results.refuse_outside_paths`).

    Raises:
        FieldError: as `task_folder`; OutsideError only with `refuse`.
    """
    try:
        return task_folder(results_dir, allowed_roots, task_id, output), ""
    except OutsideError as error:
        if refuse:
            raise
        folder = task_folder(results_dir, (), task_id, Output())
        why = str(error).partition(";")[0].partition(": ")[2]
        return folder, f"{error.path}: {why}; the result is in {folder}"


def task_folder(results_dir: Path, allowed_roots: Iterable[str | Path], task_id: str, output: Output) -> Path:
    """The folder of a task (docs/contract.md, 3), absolute and free of symbolic links. It need not exist yet.

    Raises:
        OutsideError: the path lies outside of the folders that tasks may write to.
        FieldError: the id or the path is invalid.
    """
    check_task_id(task_id)
    destination = output.destination
    asked = (destination.path or "") if isinstance(destination, LocalDestination) else ""
    where = "spec.output.destination.path"
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in asked):
        raise FieldError(f"{where}: {asked!r} contains a control character", where)
    path = Path(asked)
    if ".." in path.parts:
        raise OutsideError(f"{where}: `..` is not allowed (found {asked!r})", where)
    folder = results_dir / path  # an absolute path replaces results_dir
    if folder.name != task_id or path == Path():
        folder = folder / task_id
    real = _real(folder)
    for root in (results_dir, *map(Path, allowed_roots)):
        base = _real(root)
        if base is None and root == results_dir and folder.is_relative_to(root):
            return folder  # a fault of the node: its task waits until it is over
        if base is None:
            continue
        if real is not None and real != base and real.is_relative_to(base):
            return real
    raise OutsideError(
        f"{where}: {str(folder)!r} lies outside of the folders that tasks may write to; "
        "the node's setting `results.allowed_roots` lists those besides RESULTS_DIR",
        where,
    )
