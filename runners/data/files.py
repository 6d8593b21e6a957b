"""`data.type: jsonl | csv | parquet`: rows of one file, on this node or behind a URL."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from runners.api import BadRequest, Context, MissingDependency
from runners.data.download import fetch
from runners.data.prompts import Items
from runners.data.shard import Shard
from runners.data.tables import Columns, to_items
from runners.models.sources import local_path

Row = tuple[str, Mapping[str, Any]]


class FileData(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"timeout_s": "timeoutSec"}
):
    """spec.data of type jsonl, csv or parquet"""

    type: str
    path: str | None = None
    url: str | None = None
    headers: dict[str, str] | None = None
    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    column: str | None = None
    metadata_columns: tuple[str, ...] | dict[str, str] | None = None
    metadata_include_all: bool | None = None


def load_file(ctx: Context, section: dict[str, Any], shard: Shard | None, spec: dict[str, Any], where: str) -> Items:  # noqa: ARG001
    """See `sources.load_items`."""
    data = ctx.check(section, FileData, where)
    if (data.path is None) == (data.url is None):
        raise BadRequest(f"{where}: give either `path` or `url`")
    if data.url is not None:
        file = fetch(ctx, data.url, f"{where}.url", headers=data.headers, timeout_s=data.timeout_s).path
        field = f"{where}.url"
    else:
        file = local_path(ctx, data.path or "")
        field = f"{where}.path"
        for name, value in (("headers", data.headers), ("timeoutSec", data.timeout_s)):
            if value is not None:
                raise BadRequest(f"{where}.{name}: goes with `url`; a file of this node needs none")
        if not file.is_file():
            raise BadRequest(f"{field}: there is no file {data.path!r} on this node")
        if not os.access(file, os.R_OK):
            raise BadRequest(f"{field}: {data.path!r} cannot be read by the node's user")
    columns = Columns(data.column or "text", data.metadata_columns, bool(data.metadata_include_all), where)
    reader = {"jsonl": read_jsonl, "csv": read_csv, "parquet": read_parquet}[data.type]
    rows = reader(file, columns, field)
    if shard is not None:  # to read it twice takes less than to have all of it in memory
        mine = shard.rows(sum(1 for _ in rows))
        rows = itertools.islice(reader(file, columns, field), mine.start, mine.stop, mine.step)
    return to_items(ctx, rows, columns)


def read_jsonl(file: Path, columns: Columns, where: str) -> Iterator[Row]:
    """One object a line; empty lines are skipped.

    Raises:
        BadRequest: naming the line.
    """
    first = True
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                place = f"{where} line {number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise BadRequest(f"{place}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise BadRequest(f"{place}: expected an object (found {type(row).__name__})")
                if first:
                    columns.check(row)
                    first = False
                yield place, row
    except UnicodeDecodeError as error:
        raise BadRequest(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_csv(file: Path, columns: Columns, where: str) -> Iterator[Row]:
    """A header, then one row a record; every cell is text.

    Raises:
        BadRequest: naming the line.
    """
    csv.field_size_limit(2**31 - 1)  # prompts are longer than the 128 KiB that the module takes by itself
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            columns.check(header)
            for cells in reader:
                if not cells:
                    continue
                place = f"{where} line {reader.line_num}"
                if len(cells) != len(header):
                    raise BadRequest(f"{place}: {len(cells)} cells under {len(header)} columns")
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise BadRequest(f"{where}: not CSV ({error})") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_parquet(file: Path, columns: Columns, where: str) -> Iterator[Row]:
    """Only the columns that are wanted are read.

    Raises:
        BadRequest: it is no Parquet file.
        MissingDependency: pyarrow is missing.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingDependency("pyarrow", "training")
    import pyarrow  # type: ignore[import-not-found,unused-ignore]
    import pyarrow.parquet  # type: ignore[import-not-found,unused-ignore]

    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns.check(table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(columns=columns.wanted(table.schema_arrow.names)):
            for row in batch.to_pylist():
                yield f"{where} row {number}", row
                number += 1
    except pyarrow.ArrowException as error:
        raise BadRequest(f"{where}: not a Parquet file ({str(error).splitlines()[0]})") from None
