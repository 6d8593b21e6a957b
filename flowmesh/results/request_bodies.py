"""Request bodies: bytes in memory, or a file as multipart/form-data, read while it is sent; and upload errors."""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from flowmesh.errors import DeliveryError
from flowmesh.results.safe_files import open_regular, read_exactly


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
    """A file as multipart/form-data: one part, named `file`. Each attempt reads the file that was opened.

    Args:
        fd: an open regular file, which is closed with this.
        name: the file name in the part's header.
        form: False: the bare content instead.
    """

    def __init__(self, fd: int, name: str, *, form: bool = True) -> None:
        self._file = open(fd, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._name = name
        self.status = os.fstat(fd)
        """Of the file when it was opened."""
        self.sha256 = ""
        """Of the content that the last whole attempt sent."""
        bare = ("application/octet-stream", b"", b"")
        self.content_type, self._head, self._tail = _multipart(name) if form else bare
        self.size: int | None = len(self._head) + self.status.st_size + len(self._tail)

    @classmethod
    def at(cls, path: Path, name: str) -> FileBody:
        """The file at `path`.

        Raises:
            UploadError: there is no such regular file (a symbolic link does not count).
        """
        try:
            return cls(open_regular(path), name)
        except OSError as error:
            raise UploadError(f"{name} cannot be read: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()

    def read_at(self, offset: int, size: int) -> bytes:
        """Of the file's own content.

        Raises:
            UploadError: it cannot be read, or became shorter.
        """
        try:
            data = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise UploadError(f"{self._name} cannot be read: {error.strerror}") from error
        if not data and size:
            raise UploadError(f"{self._name} became shorter while it was sent")
        return data

    def chunks(self, size: int) -> Iterator[bytes]:
        yield self._head
        digest = hashlib.sha256()
        try:
            for data in read_exactly(self._file.fileno(), self.status.st_size, size, self._name):
                digest.update(data)
                yield data
        except DeliveryError as error:
            raise UploadError(str(error)) from error
        except OSError as error:  # requests would take it for a connection error
            raise UploadError(f"{self._name} cannot be read: {error.strerror}") from error
        self.sha256 = digest.hexdigest()
        yield self._tail


class GrowingBody:
    """Like FileBody, of a file that another thread is still writing.

    Args:
        rest_s: how long sending may continue once the file is complete.
    """

    size: int | None = None

    def __init__(self, name: str, rest_s: float) -> None:
        self.content_type, self._head, self._tail = _multipart(name)
        self._file: IO[bytes] | None = None
        self._rest_s = rest_s
        self._written = 0
        self._ended: bool | None = None
        self._until = math.inf
        self._changed = threading.Condition()
        self.sha256 = ""

    @property
    def status(self) -> os.stat_result:
        assert self._file is not None, "asked for a file that was sent"
        return os.fstat(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def grew(self, size: int, fd: int) -> None:
        """Report the number of bytes written so far, to this open file."""
        with self._changed:
            if self._file is None:
                self._file = open(os.dup(fd), "rb", buffering=0)  # noqa: SIM115 - closed by close()
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
        digest = hashlib.sha256()
        while sent < self._wait(sent):
            assert self._file is not None, "something was written"
            data = os.pread(self._file.fileno(), size, sent)
            if not data:
                raise UploadError("the file became shorter while it was sent")
            sent += len(data)
            digest.update(data)
            yield data
        self.sha256 = digest.hexdigest()
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


def _multipart(name: str) -> tuple[str, bytes, bytes]:
    """Content-Type, and the bytes before and after the content of the one part, `file`."""
    boundary = secrets.token_hex(16)
    quoted = name.replace('"', "%22").encode("utf-8", "surrogateescape")
    head = b'--%b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n' % (boundary.encode(), quoted)
    head += b"Content-Type: application/octet-stream\r\n\r\n"
    return f"multipart/form-data; boundary={boundary}", head, b"\r\n--%b--\r\n" % boundary.encode()
