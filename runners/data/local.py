"""Rows of files on this node: one file, a glob, or the files of a folder's splits.

Nothing is cached: a rewritten file gives its new rows even if its size and times are the same.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from flowmesh.validation.s3_url import is_s3
from runners.api import BadRequest, Context, MissingDependency
from runners.data import patterns, s3
from runners.data.readers import File, Row, count, read
from runners.data.reading import Refused
from runners.data.tables import Columns
from runners.models.sources import local_path

Splits = Mapping[str, Sequence[File]]
_SPLIT_NAME = re.compile(r"[\w.-]+")
_WILD = frozenset("*?[")


class Part(msgspec.Struct, frozen=True):
    """Some rows of a split."""

    files: tuple[File, ...]
    start: int = 0
    stop: int | None = None


class Table:
    """The rows of a split, of a slice of one, or of several."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)

    @property
    def is_typed(self) -> bool:
        """Whether the values are those of another library's tables, and not of text."""
        return any(file.format == "parquet" for part in self._parts for file in part.files)

    def rows(self, columns: Columns | None = None) -> Iterator[Row]:
        """All rows in order. May be called again."""
        for part in self._parts:
            yield from itertools.islice(_rows_of(part.files, columns), part.start, part.stop)

    def count(self) -> int:
        """The number of rows. Reads the files, unless the task's slice determines it."""
        return sum(count_rows(part.files) if part.stop is None else part.stop - part.start for part in self._parts)


def matching(ctx: Context, pattern: str, where: str) -> list[Path]:
    """The files that match a pattern such as `part-*.csv.gz`, sorted by name.

    Empty if `pattern` has no wildcard, or is itself the name of a file or folder.

    Raises:
        BadRequest: nothing matches, or something outside of what documents may read.
    """
    if is_s3(pattern):
        urls = s3.matching(ctx, pattern, where) if _WILD & set(pattern) else []
        return [local_path(ctx, url, where) for url in urls]
    if not _WILD & set(pattern) or local_path(ctx, pattern, where).exists():
        return []
    refusal: Refused | None = None
    for base in (Path.cwd(), ctx.results_dir):
        whole = base / os.path.expanduser(pattern)  # noqa: PTH111 - Path's raises for an unknown user
        try:
            ctx.reach.find(_before_wildcard(whole))
            found = (path for path in patterns.found(whole) if ctx.reach.find(path) is not None)
            files = sorted(path for path in found if path.is_file())
        except Refused as error:
            refusal = refusal or error
            continue
        if files:
            return files
    if refusal is not None:
        raise BadRequest(f"{where}: {pattern!r} {refusal}")
    raise BadRequest(f"{where}: no file of this node matches {pattern!r}")


def _before_wildcard(pattern: Path) -> Path:
    """The folder in which a pattern begins to match."""
    parts = list(itertools.takewhile(lambda part: not _WILD & set(part), pattern.parts))
    return Path(*parts)


def chosen_split(splits: Splits, split: str | None, shown: str, where: str) -> Table:
    """The split, slice or sum of slices that the task selects: `train`, `train[:100]`, `train[10%:]+test`.

    Args:
        split: None: the split called train, else the only one.

    Raises:
        BadRequest: unknown split, or an invalid slice.
    """
    if split is None:
        return Table([Part(tuple(splits[only_split(list(splits), shown, where)]))])
    wanted = "+".join(splits) if split == "all" else split
    names = []
    for term in wanted.split("+"):
        match = _SPLIT_NAME.match(term.strip())
        if match is None or match[0] not in splits:
            raise BadRequest(f"{where}.split: no split {term.strip()!r}; there are: {', '.join(splits)}")
        names.append(match[0])
    if [term.strip() for term in wanted.split("+")] == names:
        return Table([Part(tuple(splits[name])) for name in names])
    if importlib.util.find_spec("datasets") is None:
        raise MissingDependency("datasets")
    import datasets

    sizes = {name: count_rows(splits[name]) if name in names else 0 for name in splits}
    try:
        slices = datasets.ReadInstruction.from_spec(wanted).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise BadRequest(f"{where}.split: {' '.join(str(error).split())}") from None
    return Table([Part(tuple(splits[each.splitname]), each.from_, each.to) for each in slices])


def only_split(names: Sequence[str], shown: str, where: str) -> str:
    """The default split: train, else the only one.

    Raises:
        BadRequest: there are several others.
    """
    if "train" in names:
        return "train"
    if len(names) == 1:
        return names[0]
    raise BadRequest(f"{where}.split: missing; {shown!r} has: {', '.join(names)}")


def count_rows(files: Sequence[File]) -> int:
    return sum(count(file) for file in files)


def _rows_of(files: Sequence[File], columns: Columns | None) -> Iterator[Row]:
    for file in files:
        yield from read(file, columns)
