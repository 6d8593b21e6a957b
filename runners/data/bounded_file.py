"""An archive as `tarfile` and `zipfile` read it, with bounds on what they take into memory at once.

Both read some parts of an archive whole, as long as the archive says they are: the long names and headers of tar, the
directory of zip. And a compressed archive can ask for gigabytes of memory before the first byte.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 1 << 20
MAX_XZ_MEMORY_BYTES = 256 << 20
"""The strongest preset of xz needs 65 MiB to decompress; what is made for large files, up to this."""
_MAGIC = {b"\x1f\x8b": "tar.gz", b"BZh": "tar.bz2", b"\xfd7zXZ\x00": "tar.xz", b"\x5d\x00\x00": "tar.xz"}


class TooMuch(Exception):
    """Raised when an archive asks for more memory than it may have."""


class BoundedFile(io.RawIOBase):
    """Reads another file, at most so many bytes at once.

    Args:
        most_bytes: of one read.
    """

    def __init__(self, file: IO[bytes], most_bytes: int, what: str) -> None:
        self._file = file
        self._most_bytes = most_bytes
        self._what = what
        self.left_bytes: int | None = None
        """Of all reads together, until it is set again; None: no bound."""

    def read(self, size: int = -1) -> bytes:
        if size > self._most_bytes:
            raise self._refusal()
        if self.left_bytes is not None:
            self.left_bytes -= max(size, 0)
            if self.left_bytes < 0:
                raise self._refusal()
        data = self._file.read(size if size >= 0 else self._most_bytes + 1)
        if len(data) > self._most_bytes:
            raise self._refusal()
        return data

    def _refusal(self) -> TooMuch:
        return TooMuch(f"{self._what} of more than {self._most_bytes} bytes")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


class _Xz(io.RawIOBase):
    """A decompressed xz file, read forwards. `lzma.open` would have no bound on the memory."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._at = 0
        self._unused = b""
        self._stream = self._new()

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=MAX_XZ_MEMORY_BYTES)

    def read(self, size: int = -1) -> bytes:
        parts = []
        while size > 0 and (part := self._some(min(size, CHUNK_BYTES))):
            parts.append(part)
            size -= len(part)
            self._at += len(part)
        return b"".join(parts)

    def _some(self, size: int) -> bytes:
        while True:
            if self._stream.eof:  # several streams may follow each other, with padding between them
                self._unused = (self._stream.unused_data or self._file.read(CHUNK_BYTES)).lstrip(b"\0")
                if not self._unused:
                    return b""
                self._stream = self._new()
            data = self._unused
            self._unused = b""
            if self._stream.needs_input and not data:
                data = self._file.read(CHUNK_BYTES)
                if not data:
                    raise EOFError("it ends before its end mark")
            if part := self._stream.decompress(data, size):
                return part

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._at:
            raise io.UnsupportedOperation("only forwards")
        while self._at < offset and self.read(min(CHUNK_BYTES, offset - self._at)):
            pass
        return self._at

    def close(self) -> None:
        self._file.close()
        super().close()


def tar_format(path: Path) -> str:
    """How a tar archive is compressed, by what it begins with."""
    with path.open("rb") as file:
        start = file.read(6)
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "tar")


def open_tar(path: Path, archive_format: str) -> IO[bytes]:
    """The tar inside; decompressed while it is read.

    Args:
        archive_format: as docs/tasks.md names it.
    """
    opened: Any
    match archive_format:
        case "tar.gz" | "tgz":
            opened = gzip.open(path)  # noqa: SIM115 - closed by the caller
        case "tar.bz2":
            opened = bz2.open(path)  # noqa: SIM115
        case "tar.xz":
            opened = _Xz(path)
        case _:
            opened = path.open("rb")
    return opened
