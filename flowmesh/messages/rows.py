"""`rows.jsonl`: the items that a task has finished so far, one line each, for a retry and for a failed task's result.

A line is `{"crc32": "<8 hex digits>", "row": {…}}`; the checksum is of the bytes of `row`. The first line says how many
items the task has. A line whose checksum is wrong counts as missing.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import msgspec

ROWS_FILE = "rows.jsonl"
ROWS_ARCHIVE = "rows.jsonl.gz"
MAX_LINE_BYTES = 64 * 1024**2
"""A longer line is skipped: a reader must not run out of memory for a file that a task wrote."""


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One finished item."""

    key: str = ""
    """Digest of what determines it; empty: a retry computes it again."""
    occurrence: int = 0
    """Of this key in its task: the same item given twice has two rows."""
    index: int | None = None
    """Its position in the task's result; None: it belongs to an earlier document of the task."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    item: dict[str, Any] = {}
    """Its entry in the result."""
    files: str = ""
    """Digest of the files that the item has beside the log, where it counts only with them."""


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The first line."""

    total: int
    """Items of the task."""
    field: str = "items"
    """The list in the result that holds the items."""
    document: str = ""
    """From `document_key`; empty: not known."""


class Counts(msgspec.Struct, frozen=True):
    """How many rows of a task stand."""

    done: int
    total: int
    """Items of the task."""
    reused: int = 0
    """Of `done`: computed by an earlier attempt or by another task."""
    reused_tokens: int = 0
    """Tokens of prompts and answers that were not computed again."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What a row file holds."""

    rows: tuple[Row, ...] = ()
    head: Head | None = None
    whole_bytes: int = 0
    """Length of the file up to and including its last whole line."""
    bad_lines: int = 0

    @property
    def current(self) -> dict[int, Row]:
        """The rows of the task's document, by their position; the last one where there are two."""
        return {row.index: row for row in self.rows if row.index is not None}

    @property
    def counts(self) -> Counts:
        done = len(self.current)
        return Counts(done=done, total=max(done, self.head.total if self.head else 0))


class _Line(msgspec.Struct, frozen=True):
    crc32: str
    row: msgspec.Raw


_line_decoder = msgspec.json.Decoder(_Line)
_row_decoder = msgspec.json.Decoder(Row)
_head_decoder = msgspec.json.Decoder(Head)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)  # numpy's, and what a table may hold


_encoder = msgspec.json.Encoder(enc_hook=_plain)


_SAME_ITEMS = frozenset({"resume", "output", "timeoutSec", "resources", "engine", "enforce_cpu"})


def document_key(spec: Mapping[str, Any]) -> str:
    """Digest of what a document asks to compute, not of how, for how long, and for whom."""
    asked = {name: value for name, value in spec.items() if name not in _SAME_ITEMS}
    return digest(asked)


def digest(value: Any) -> str:
    """Of a value that msgspec can encode. The order of a mapping's keys does not matter; 1 and "1" are one key."""
    plain = msgspec.to_builtins(value, str_keys=True, enc_hook=str)
    return hashlib.blake2b(msgspec.json.encode(plain, order="deterministic"), digest_size=16).hexdigest()


def line(row: Row | Head) -> bytes:
    """One line of the file. Numbers that are not finite become null."""
    body = _encoder.encode(row)
    return b'{"crc32":"%08x","row":%b}\n' % (zlib.crc32(body), body)


def read(file: IO[bytes]) -> Kept:
    """Everything whole in a row file. A torn or changed line is left out."""
    rows: list[Row] = []
    head: Head | None = None
    whole = bad = 0
    for data, length in _lines(file):
        if data is not None and not data.endswith(b"\n"):
            break  # torn: the last write did not end
        whole += length
        found = None if data is None else _decoded(data)
        if isinstance(found, Head):
            head = found
        elif isinstance(found, Row):
            rows.append(found)
        else:
            bad += 1
    return Kept(rows=tuple(rows), head=head, whole_bytes=whole, bad_lines=bad)


def scan(file: IO[bytes]) -> Iterator[tuple[Row | Head, int, int]]:
    """Each whole line's content, where it begins in the file, and how long it is. One at a time is in memory."""
    start = 0
    for data, length in _lines(file):
        if data is not None and data.endswith(b"\n") and (found := _decoded(data)) is not None:
            yield found, start, length
        start += length


def compress(lines: Iterable[bytes], target: IO[bytes]) -> None:
    """Write ROWS_ARCHIVE. Its bytes depend on the lines only."""
    with gzip.GzipFile(filename="", mode="wb", fileobj=target, mtime=0) as archive:
        for each in lines:
            archive.write(each)


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes | None, int]]:
    """Each line and its length; None for one that is too long."""
    while data := file.readline(MAX_LINE_BYTES):
        length = len(data)
        if length < MAX_LINE_BYTES or data.endswith(b"\n"):
            yield data, length
            continue
        while data and not data.endswith(b"\n"):
            data = file.readline(MAX_LINE_BYTES)
            length += len(data)
        yield None, length


def _decoded(data: bytes) -> Row | Head | None:
    try:
        found = _line_decoder.decode(data)
        body = bytes(found.row)
        if f"{zlib.crc32(body):08x}" != found.crc32:
            return None
        return _head_decoder.decode(body) if body.startswith(b'{"total":') else _row_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
