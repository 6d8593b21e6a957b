"""What a request carries: bytes in memory, or a file as multipart/form-data, read as it is sent."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from flowmesh.errors import DeliveryError


class UploadError(DeliveryError):
    """A body that was not accepted. `status` is the server's last word, None where it had none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Body(Protocol):
    """What is sent. Iterated once an attempt."""

    content_type: str
    size: int

    def chunks(self, size: int) -> Iterator[bytes]: ...


class BytesBody:
    """Bytes that are in memory already."""

    def __init__(self, data: bytes, content_type: str) -> None:
        self.content_type = content_type
        self.size = len(data)
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
        boundary = secrets.token_hex(16)
        quoted = name.replace('"', "%22").encode("utf-8", "surrogateescape")
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self._path = path
        self._head = b'--%b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n' % (
            boundary.encode(),
            quoted,
        )
        self._head += b"Content-Type: application/octet-stream\r\n\r\n"
        self._tail = b"\r\n--%b--\r\n" % boundary.encode()
        self._content_bytes = status.st_size
        self.size = len(self._head) + status.st_size + len(self._tail)

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
