"""Lines of text files: gzip, bzip2 and xz are unpacked, byte order marks followed, a wrong byte named by its line.

A file is UTF-8 unless it begins with the byte order mark of UTF-16 or UTF-32. No other encoding is guessed.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runners.api import BadRequest

_COMPRESSED: tuple[tuple[bytes, Any], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
)
_REFUSED = ((b"PK\x03\x04", "a zip archive"), (b"\x28\xb5\x2f\xfd", "compressed by zstd"))
_MARKS = (  # the longer ones first: that of UTF-16 begins that of UTF-32
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
HEAD_BYTES = 8
MAX_LINE_BYTES = 64 << 20
"""Of a line that `raw_lines` gives out."""


def lines(file: Path, where: str) -> Iterator[str]:
    """The lines of `file` with their ends, which may be LF, CRLF or CR.

    Args:
        where: the name of the file in errors.

    Raises:
        BadRequest: it is in another encoding, holds a NUL byte, or its compressed data are damaged; names the line.
    """
    encoding = "utf-8"
    try:
        with _unpacked(file, where) as raw:
            encoding = encoding_of(raw.peek(HEAD_BYTES)[:HEAD_BYTES])
            with io.TextIOWrapper(raw, encoding=encoding, newline="") as text:
                for number, line in enumerate(text, start=1):
                    if "\0" in line:
                        raise BadRequest(
                            f"{where} line {number}: a NUL byte, so it is not text; "
                            "UTF-16 needs a byte order mark, else save it as UTF-8"
                        )
                    yield line
    except UnicodeDecodeError:
        name = encoding.removesuffix("-sig").upper()
        raise BadRequest(f"{where}: not {name} text ({_wrong_byte(file, where, encoding)}); save it as UTF-8") from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise BadRequest(f"{where}: its compressed data are damaged ({error})") from None


def raw_lines(file: Path, where: str) -> Iterator[bytes | None]:
    """The lines of `file` without their ends (LF or CRLF), for a format in which a damaged line is that line's error.

    None stands for a line of more than MAX_LINE_BYTES, so that no file needs more memory than that.

    Raises:
        BadRequest: it is UTF-16 or UTF-32, or its compressed data are damaged.
    """
    try:
        with _unpacked(file, where) as raw:
            if encoding_of(raw.peek(HEAD_BYTES)[:HEAD_BYTES]) != "utf-8-sig":
                raise BadRequest(f"{where}: not UTF-8 text, by its byte order mark; save it as UTF-8")
            mark = codecs.BOM_UTF8
            while data := raw.readline(MAX_LINE_BYTES + 1):
                rest, too_long = data, len(data) > MAX_LINE_BYTES and not data.endswith(b"\n")
                while too_long and rest and not rest.endswith(b"\n"):
                    rest = raw.readline(MAX_LINE_BYTES + 1)
                yield None if too_long else data.removeprefix(mark).rstrip(b"\r\n")
                mark = b""
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise BadRequest(f"{where}: cannot be read, or its compressed data are damaged ({error})") from None


def encoding_of(head: bytes) -> str:
    """The codec for a text that begins with `head`, by its byte order mark."""
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8-sig")


def _unpacked(file: Path, where: str) -> Any:
    """A buffered binary reader of the contents. Compression is detected by the first bytes, not by the name."""
    with file.open("rb") as raw:
        head = raw.read(HEAD_BYTES)
    for magic, what in _REFUSED:
        if head.startswith(magic):
            raise BadRequest(f"{where}: {what}, which is not read here; unpack it first")
    opener = next((opener for magic, opener in _COMPRESSED if head.startswith(magic)), None)
    return file.open("rb") if opener is None else opener(file, "rb")


def _wrong_byte(file: Path, where: str, encoding: str) -> str:
    """The first byte that `encoding` cannot decode, and its line."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    with _unpacked(file, where) as raw:
        try:
            for piece in raw:
                line += decoder.decode(piece).count("\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            return f"byte 0x{error.object[error.start]:02x} in line {line}"
    return "cut off at its end"
