"""What a request carries: bytes in memory, or a file as multipart/form-data, read as it is sent."""

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
from typing import IO, Protocol

from flowmesh.errors import DeliveryError


class UploadError(DeliveryError):
    """A body that was not accepted. `status` is the server's last word, None where it had none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Body(Protocol):
    """What is sent. Iterated once an attempt."""

    content_type: str
    size: int | None
    """None: not known before its end."""

    def chunks(self, size: int) -> Iterator[bytes]: ...


class BytesBody:
    """Bytes that are in memory already."""

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

    Raises:
        UploadError: there is no such regular file (a symbolic link is none).
    """

    def __init__(self, path: Path, name: str) -> None:
        try:
            status = path.lstat()
        except OSError as error:
            raise UploadError(f"{name} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise UploadError(f"{name} is no regular file")
        self._path = path
        self.content_type, self._head, self._tail = _multipart(name)
        self._content_bytes = status.st_size
        self.size: int | None = len(self._head) + status.st_size + len(self._tail)

    def chunks(self, size: int) -> Iterator[bytes]:
        yield self._head
        left = self._content_bytes
        try:
            with open(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as file:
                while left:
                    data = file.read(min(size, left))
                    if not data:
                        raise UploadError(f"{self._path.name} became shorter while it was sent")
                    left -= len(data)
                    yield data
        except OSError as error:  # as it is, it would look like a connection's error
            raise UploadError(f"{self._path.name} cannot be read: {error.strerror}") from error
        yield self._tail


class GrowingBody:
    """As FileBody, of a file that is still being written, by another thread.

    Args:
        places: where the file lies, the first that is there.
        rest_s: how long sending may go on when the file is whole.
    """

    size: int | None = None

    def __init__(self, places: tuple[Path, ...], name: str, rest_s: float) -> None:
        self.content_type, self._head, self._tail = _multipart(name)
        self._places = places
        self._rest_s = rest_s
        self._there = 0
        self._ended: bool | None = None
        self._until = math.inf
        self._changed = threading.Condition()

    def grew(self, size: int) -> None:
        """So many bytes of it are there."""
        with self._changed:
            self._there = size
            self._changed.notify_all()

    def ended(self, *, whole: bool) -> None:
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
        """How much is there, once that is more than `sent` or all."""
        with self._changed:
            self._changed.wait_for(lambda: self._there > sent or self._ended is not None)
            if self._ended is False:
                raise UploadError("what was to be sent did not come to its end")
            if time.monotonic() > self._until:
                raise UploadError(f"not sent within {self._rest_s:g} s after it was whole", status=408)
            return self._there

    def _open(self) -> IO[bytes]:
        for path in self._places:
            with contextlib.suppress(OSError):
                return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0)
        raise UploadError(f"{self._places[0].name} cannot be read")


def _multipart(name: str) -> tuple[str, bytes, bytes]:
    """Content-Type, and what stands before and behind the content of the one part, `file`."""
    boundary = secrets.token_hex(16)
    quoted = name.replace('"', "%22").encode("utf-8", "surrogateescape")
    head = b'--%b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n' % (boundary.encode(), quoted)
    head += b"Content-Type: application/octet-stream\r\n\r\n"
    return f"multipart/form-data; boundary={boundary}", head, b"\r\n--%b--\r\n" % boundary.encode()
