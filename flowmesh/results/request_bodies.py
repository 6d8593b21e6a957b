"""Request bodies: bytes in memory, or a file as multipart/form-data, read while it is sent; and upload errors."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from flowmesh.errors import DeliveryError
from flowmesh.results.safe_files import read_exactly


class UploadError(DeliveryError):
    """Raised when a body was not accepted. `status` is the server's HTTP status; None: it sent none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Patience(NamedTuple):
    """A limit for repeated failures of one kind, shorter than the delivery's."""

    kind: str
    limit_s: float


class TryAgain(UploadError):
    """Raised when an attempt failed and another one may succeed, after `retry_after_s` at the earliest."""

    def __init__(
        self,
        message: str,
        status: int | None = None,
        retry_after_s: float = 0.0,
        patience: Patience | None = None,
    ) -> None:
        super().__init__(message, status)
        self.retry_after_s = retry_after_s
        self.patience = patience


class Postponed(UploadError):
    """Raised instead of waiting for the next attempt, which is due in `again_in_s`."""

    def __init__(self, message: str, status: int | None, *, again_in_s: float, attempts: int, origin: str) -> None:
        super().__init__(message, status)
        self.again_in_s = again_in_s
        self.attempts = attempts
        self.origin = origin


class Body(Protocol):
    """Read once per attempt."""

    content_type: str
    size: int | None
    """In bytes; None: not known before its end."""

    def chunks(self, size: int) -> Iterator[bytes]: ...


class BytesBody:
    """Bytes in memory."""

    def __init__(self, data: bytes, content_type: str) -> None:
        self.content_type = content_type
        self.size: int | None = len(data)
        self._data = data

    def chunks(self, size: int) -> Iterator[bytes]:
        view = memoryview(self._data)
        for start in range(0, len(view), size):
            yield bytes(view[start : start + size])


class FileBody:
    """A file as multipart/form-data: one part, named `file`.

    Args:
        name: the file name in the part's header.

    Raises:
        UploadError: there is no such regular file (a symbolic link does not count).
    """

    def __init__(self, path: Path, name: str) -> None:
        try:
            status = path.lstat()
        except OSError as error:
            raise UploadError(f"{name} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise UploadError(f"{name} is not a regular file")
        self._path = path
        self.content_type, self._head, self._tail = _multipart(name)
        self._content_bytes = status.st_size
        self.size: int | None = len(self._head) + status.st_size + len(self._tail)

    def chunks(self, size: int) -> Iterator[bytes]:
        yield self._head
        try:
            yield from read_exactly(self._path, self._content_bytes, size)
        except DeliveryError as error:
            raise UploadError(str(error)) from error
        except OSError as error:  # requests would take it for a connection error
            raise UploadError(f"{self._path.name} cannot be read: {error.strerror}") from error
        yield self._tail


class GrowingBody:
    """Like FileBody, of a file that another thread is still writing.

    Args:
        places: paths that the file may have; the first that exists is read.
        rest_s: how long sending may continue once the file is complete.
    """

    size: int | None = None

    def __init__(self, places: tuple[Path, ...], name: str, rest_s: float) -> None:
        self.content_type, self._head, self._tail = _multipart(name)
        self._places = places
        self._rest_s = rest_s
        self._written = 0
        self._ended: bool | None = None
        self._until = math.inf
        self._changed = threading.Condition()

    def grew(self, size: int) -> None:
        """Report the number of bytes written so far."""
        with self._changed:
            self._written = size
            self._changed.notify_all()

    def ended(self, *, whole: bool) -> None:
        """Report that nothing more is written; `whole` False aborts the upload."""
        with self._changed:
            self._ended = whole
            self._until = time.monotonic() + self._rest_s
            self._changed.notify_all()

    def chunks(self, size: int) -> Iterator[bytes]:
        yield self._head
        sent = 0
        with self._open() as file:
            while sent < self._wait(sent):
                data = file.read(size)
                sent += len(data)
                yield data
        yield self._tail

    def _wait(self, sent: int) -> int:
        """Wait until more than `sent` bytes, or all of them, are written; returns how many are."""
        with self._changed:
            self._changed.wait_for(lambda: self._written > sent or self._ended is not None)
            if self._ended is False:
                raise UploadError("the file was not completed")
            if time.monotonic() > self._until:
                raise UploadError(f"not sent within {self._rest_s:g} s after it was complete", status=408)
            return self._written

    def _open(self) -> IO[bytes]:
        for path in self._places:
            with contextlib.suppress(OSError):
                return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0)
        raise UploadError(f"{self._places[0].name} cannot be read")


def _multipart(name: str) -> tuple[str, bytes, bytes]:
    """Content-Type, and the bytes before and after the content of the one part, `file`."""
    boundary = secrets.token_hex(16)
    quoted = name.replace('"', "%22").encode("utf-8", "surrogateescape")
    head = b'--%b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n' % (boundary.encode(), quoted)
    head += b"Content-Type: application/octet-stream\r\n\r\n"
    return f"multipart/form-data; boundary={boundary}", head, b"\r\n--%b--\r\n" % boundary.encode()
