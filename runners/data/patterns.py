"""The files that a pattern such as `part-*.csv` or `data/**/*.jsonl` matches.

The folders may be another task's: `**` follows no links to folders, and enters nothing that is mounted in them.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from flowmesh.files.walk import Troubles, walk

_ANY_DEPTH = "**"


def found(pattern: Path) -> Iterator[Path]:
    """What an absolute pattern matches, in no order. Folders that cannot be read are passed over.

    As with a shell's, `*` and `**` match no name that begins with a dot.
    """
    parts = pattern.parts
    at = parts.index(_ANY_DEPTH) if _ANY_DEPTH in parts else len(parts)
    begins = glob.iglob(str(Path(*parts[:at])))  # noqa: PTH207 - one level a part; Path.glob takes no absolute ones
    if at == len(parts):
        yield from map(Path, begins)
        return
    for begin in begins:
        for path in _files_below(Path(begin), hidden=any(part.startswith(".") for part in parts[at:])):
            if _matches(path.split("/"), parts[at:]):
                yield Path(begin, path)


def _files_below(folder: Path, *, hidden: bool) -> Iterator[str]:
    """Relative paths of the files and links below a folder."""
    try:
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for entry in walk(top, Troubles(), rights=0, passed_over=lambda name: not hidden and name.startswith(".")):
            if entry.is_file or stat.S_ISLNK(entry.status.st_mode):
                yield entry.path
    finally:
        os.close(top)


def _matches(names: Iterable[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, all positions in the pattern at once."""
    positions = _with_skipped({0}, pattern)
    for name in names:
        after = set()
        for each in positions & set(range(len(pattern))):
            if pattern[each] == _ANY_DEPTH:
                after |= set() if name.startswith(".") else {each}
            elif fnmatchcase(name, pattern[each]) and (pattern[each].startswith(".") or not name.startswith(".")):
                after.add(each + 1)
        positions = _with_skipped(after, pattern)
    return len(pattern) in positions


def _with_skipped(positions: set[int], pattern: Sequence[str]) -> set[int]:
    """The positions, and those behind a `**` there, which may match nothing."""
    every = set(positions)
    for at, part in enumerate(pattern):
        if at in every and part == _ANY_DEPTH:
            every.add(at + 1)
    return every
