"""What the gateway reads of S3 for tasks: objects, and lists of them, as far as `cloud.read` allows it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flowmesh.messages.cloud import Keys, S3Access
from flowmesh.results.s3_client import S3Error, error_of, make_client
from flowmesh.validation.s3_url import Location, is_allowed

_PASSED = {"Range": "Range", "If-Match": "IfMatch", "If-None-Match": "IfNoneMatch"}
TIMEOUT_S = 30.0
"""To connect, and for each read."""


class Headers(Protocol):
    def get(self, name: str, /) -> str | None: ...


class Object(NamedTuple):
    """One of a list."""

    key: str
    size: int
    etag: str


class S3Reader:
    """
    Args:
        keys: the node's own; None: see `make_client`.
    """

    def __init__(self, access: S3Access, keys: Keys | None) -> None:
        self._access = access
        self._keys = keys
        self._lock = threading.Lock()
        self._client: Any = None
        self._made_of: tuple[int, int] | None = None

    def get(self, location: Location, headers: Headers) -> dict[str, Any]:
        """The object's answer, with its body still to be read.

        Args:
            headers: `Range`, `If-Match`, `If-None-Match`.

        Raises:
            S3Error: with the status 304, 412 or 416 where that is the answer.
        """
        self._check(location)
        asked = {field: value for name, field in _PASSED.items() if (value := headers.get(name)) is not None}
        try:
            found: dict[str, Any] = self._ready().get_object(Bucket=location.bucket, Key=location.key, **asked)
        except Exception as error:
            raise error_of(error, location, self._access) from error
        return found

    def list(self, location: Location, at_most: int) -> list[Object]:
        """The objects whose keys begin with the location's key and may be read, sorted by key.

        Raises:
            S3Error: there are more than `at_most`, or it cannot be listed.
        """
        self._check(location)
        found: list[Object] = []
        try:
            pages = self._ready().get_paginator("list_objects_v2").paginate(Bucket=location.bucket, Prefix=location.key)
            for page in pages:
                for each in page.get("Contents", ()):
                    if is_allowed(self._access.read, Location(location.bucket, each["Key"])):
                        found.append(Object(each["Key"], each["Size"], each["ETag"]))
                if len(found) > at_most:
                    text = f"{location.url}: more than {at_most} objects begin so (runners.unpack_max_files)"
                    raise S3Error("refused", text)
        except Exception as error:
            raise error_of(error, location, self._access) from error
        return found

    def _check(self, location: Location) -> None:
        if not is_allowed(self._access.read, location):
            text = f"{location.url}: the operator does not allow documents to read it (the node's setting cloud.read)"
            raise S3Error("refused", text, 403)

    def _ready(self) -> Any:
        """The client; another one once the credentials file has changed."""
        file = self._access.credentials_file
        made_of = None
        if file is not None and self._keys is None:
            try:
                status = Path(file).stat()
                made_of = (status.st_ino, status.st_mtime_ns)
            except OSError:
                made_of = (0, 0)
        with self._lock:
            if self._client is None or made_of != self._made_of:
                self._client, self._made_of = make_client(self._access, self._keys, TIMEOUT_S), made_of
            return self._client
