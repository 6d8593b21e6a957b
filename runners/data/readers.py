"""Rows of one file: CSV, JSON lines, a JSON array, plain lines, Parquet. All sources of data read files with these.

Text is never converted: a CSV cell is always text, including `007` and `NA`, and a JSON string never becomes a date or
a number. JSON and Parquet values keep their own types.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from flowmesh.validation.names import is_name
from runners.api import BadRequest, MissingDependency
from runners.data import json_text
from runners.data.prompts import check_text
from runners.data.reading import Reach, Refused
from runners.data.tables import Columns
from runners.data.text_files import lines

Row = tuple[str, Mapping[str, Any]]
"""The name of a row in errors, and its cells by column."""

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSED = frozenset({".gz", ".bz2", ".xz"})
_DELIMITERS = {"csv": ",", "tsv": "\t"}


class File(msgspec.Struct, frozen=True, kw_only=True):
    """One file of rows on this node."""

    path: Path
    format: str
    where: str
    """Its name in errors."""
    delimiter: str | None = None
    """For CSV with another delimiter than the format's default."""
    reach: Reach | None = None
    """What bounds a file that a document names. None: one that the node downloaded."""


def format_of(name: str) -> str | None:
    """The format of a file or URL by its name; `x.csv.gz` is CSV. None: unknown."""
    path = PurePosixPath(name.lower())
    suffix = PurePosixPath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return FORMATS.get(suffix)


def read(file: File, columns: Columns | None = None) -> Iterator[Row]:
    """The rows of `file`, one by one.

    Args:
        columns: what the task uses. A missing column is an error before, or at, the first row.

    Raises:
        BadRequest: naming the line, or the missing column and those there are.
        MissingDependency: Parquet needs pyarrow.
    """
    with judged(file) as opened:
        yield from _READERS[file.format](opened, columns)


def count(file: File) -> int:
    """The number of rows in `file`. Parquet files are not read beyond their footer. Errors as for `read`."""
    if file.format != "parquet":
        return sum(1 for _ in read(file))
    with judged(file) as opened, _parquet(opened) as table:
        return int(table.metadata.num_rows)


@contextlib.contextmanager
def judged(file: File) -> Iterator[File]:
    """The file by a name that nothing can be put under meanwhile.

    Raises:
        BadRequest: it leads outside of what documents may read, or cannot be opened.
    """
    if file.reach is None:
        yield file
        return
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(file.reach.opened(file.path))
        except Refused as error:
            raise BadRequest(f"{file.where}: {error}") from None
        except OSError as error:
            raise BadRequest(f"{file.where}: cannot be opened: {error.strerror}") from None
        yield msgspec.structs.replace(file, path=path)


def _read_csv(file: File, columns: Columns | None) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # prompts exceed the module's default of 128 KiB
    delimiter = file.delimiter or _DELIMITERS[file.format]
    reader = csv.reader(lines(file.path, file.where), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{file.where} line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise BadRequest(f"{place}: not CSV from here on ({error})") from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            _check_header(header, place)
            if columns is not None:
                columns.check(header)
        elif len(cells) != len(header):
            raise BadRequest(f"{place}: {len(cells)} cells under {len(header)} columns")
        else:
            yield place, dict(zip(header, cells, strict=True))


def _check_header(header: list[str], place: str) -> None:
    seen: dict[str, int] = {}
    for number, name in enumerate(header, start=1):
        if name in seen:
            called = f"both called {name!r}" if is_name(name) else "called the same"
            raise BadRequest(f"{place}: columns {seen[name]} and {number} are {called}; rename one")
        seen[name] = number


def _read_jsonl(file: File, columns: Columns | None) -> Iterator[Row]:
    first = True
    for number, line in enumerate(lines(file.path, file.where), start=1):
        if not line.strip():
            continue
        place = f"{file.where} line {number}"
        row = _object(_parsed(line.strip(), place), place)
        if first and columns is not None:
            columns.check(row)
        first = False
        yield place, row


def _read_json(file: File, columns: Columns | None) -> Iterator[Row]:
    """An array of objects, else one object a line."""
    start = next((line.strip() for line in lines(file.path, file.where) if line.strip()), "")
    if not start.startswith("["):
        yield from _read_jsonl(file, columns)
        return
    items = _parsed("".join(lines(file.path, file.where)), file.where)
    for number, item in enumerate(items):
        place = f"{file.where} item {number}"
        row = _object(item, place)
        if number == 0 and columns is not None:
            columns.check(row)
        yield place, row


def _parsed(text: str, place: str) -> Any:
    try:
        value = json_text.parse(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise BadRequest(f"{place}: not JSON ({error.msg} at {at})") from None
    except ValueError as error:
        raise BadRequest(f"{place}: not JSON ({error})") from None
    if "\\u" in text:
        check_text(value, place)
    return value


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{place}: expected an object (found {type(value).__name__})")
    return value


def _read_text(file: File, columns: Columns | None) -> Iterator[Row]:
    if columns is not None:
        columns.check(["text"])
    for number, line in enumerate(lines(file.path, file.where), start=1):
        yield f"{file.where} line {number}", {"text": line.rstrip("\r\n")}


def _read_parquet(file: File, columns: Columns | None) -> Iterator[Row]:
    """Reads only the columns that the task uses."""
    with _parquet(file) as table:
        names = table.schema_arrow.names
        _check_header(names, file.where)
        if columns is not None:
            columns.check(names)
            names = columns.wanted(names)
        number = 0
        for batch in table.iter_batches(columns=names):
            for row in batch.to_pylist():
                yield f"{file.where} row {number}", row
                number += 1


@contextlib.contextmanager
def _parquet(file: File) -> Iterator[Any]:
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingDependency("pyarrow")
    import pyarrow  # type: ignore[import-not-found,unused-ignore]
    import pyarrow.parquet  # type: ignore[import-not-found,unused-ignore]

    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise BadRequest(f"{file.where}: not a Parquet file ({str(error).splitlines()[0]})") from None


_READERS: dict[str, Callable[[File, Columns | None], Iterator[Row]]] = {
    "csv": _read_csv,
    "tsv": _read_csv,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "text": _read_text,
    "parquet": _read_parquet,
}
