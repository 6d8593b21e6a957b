"""Collects what `spec.outputs` names into the task's artifacts, which are delivered."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowmesh.files.folder import Folder
from flowmesh.files.walk import Troubles
from runners.api import Context, RunnerError

MOST_LISTED = 1000
_WILD = re.compile(r"\*|\?|\[[!^]?\]?[^\]/]*\]|[^*?\[]+|\[")


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
    if not patterns:
        return []
    wanted = [re.compile(expression(pattern), re.DOTALL) for pattern in patterns]
    unmatched = set(range(len(patterns)))
    found: list[str] = []
    troubles = Troubles()
    with Folder(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), folder) as opened:
        for entry in opened.entries(troubles, ordered=True):
            path = entry.path
            matching = {i for i, each in enumerate(wanted) if each.fullmatch(path)}
            unmatched -= matching
            if matching and (entry.is_file or (stat.S_ISLNK(entry.status.st_mode) and (folder / path).is_file())):
                found.append(path)
    if strict and unmatched:
        first = min(unmatched)
        message = f"spec.outputs[{first}]: the program succeeded, and nothing matches {patterns[first]!r} in {folder}"
        raise Missing(message)
    listed: list[dict[str, Any]] = []
    for path in found:
        target = ctx.artifacts_dir / path
        _bring(folder / path, target)
        if len(listed) < MOST_LISTED:
            listed.append({"path": path, "bytes": target.stat().st_size})
    if len(found) > MOST_LISTED:
        ctx.log.warning("outputs: %d files; the result lists the first %d", len(found), MOST_LISTED)
    if troubles:
        ctx.log.warning("outputs: not all of %s can be looked at: %s", folder, troubles)
    return listed


def expression(pattern: str) -> str:
    """A pattern as a regular expression for paths; of a folder that matches, it matches all that is below.

    `*` and `?` stay within a name, `**` is any number of folders.
    """
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    made = ""
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            made += ".+" if last else "(?:[^/]+/)*"
        else:
            made += "".join(map(_piece, _WILD.findall(part))) + ("" if last else "/")
    return f"{made}(?:/.*)?"


def _piece(text: str) -> str:
    if text == "*":
        return "[^/]*"
    if text == "?":
        return "[^/]"
    if text.startswith("[") and len(text) > 1:
        inner = text[1:-1].replace("\\", r"\\").replace("[", r"\[")
        return f"(?!/)[{'^' + inner[1:] if inner.startswith('!') else inner}]"
    return re.escape(text)


def _bring(path: Path, target: Path) -> None:
    """As a second name of the file, where that is possible; else as a copy. A link counts as what it leads to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if not path.is_symlink():
        with contextlib.suppress(OSError):
            os.link(path, target)
            return
    shutil.copyfile(path, target)
