"""Sends bodies to S3, one attempt a call. Large files go in parts, and become an object only when all have arrived.

What has arrived of a file is in the delivery's state: the next attempt, also of another process, goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from flowmesh.messages.cloud import Keys, S3Access
from flowmesh.results.delivery_state import DeliveryState, Multipart
from flowmesh.results.request_bodies import Body, BytesBody, FileBody, Patience, TryAgain, UploadError
from flowmesh.results.s3_client import S3Error, error_of, make_client
from flowmesh.results.throttle import Throttle
from flowmesh.validation.s3_url import Location, is_allowed, parse

PART_BYTES = 16 << 20
MAX_PARTS = 10_000
"""S3's own limit; larger files have larger parts."""
_CHUNK_BYTES = 64 * 1024
_REFUSED = Patience("credentials", 900.0)
"""The node's key or its policy was changed, and not everywhere at once."""

log = logging.getLogger("flowmesh.delivery")


class S3Uploads:
    """
    Args:
        access: the node's; None: its settings allow nothing.
        deadline: on the monotonic clock; no transfer continues past it.
        progress: called with the number of bytes of the current body that arrived or were sent.
        state: remembers parts.
    """

    def __init__(
        self,
        access: S3Access | None,
        keys: Keys | None,
        *,
        timeout_s: float,
        deadline: float,
        throttle: Throttle,
        progress: Callable[[int], None],
        state: DeliveryState,
    ) -> None:
        self._access = access or S3Access()
        self._keys = keys
        self._timeout_s = timeout_s
        self._deadline = deadline
        self._throttle = throttle
        self._progress = progress
        self._state = state
        self._made: Any = None

    def close(self) -> None:
        if self._made is not None:
            self._made.close()

    def attempt(self, method: str, url: str, body: Body) -> None:  # noqa: ARG002
        """Put `body` at `url`, s3://BUCKET/KEY.

        Raises:
            TryAgain: it did not arrive, and another attempt may succeed.
            UploadError: it was refused for good.
        """
        location = self._location(url)
        if time.monotonic() >= self._deadline:
            raise TryAgain("no time is left")
        try:
            if isinstance(body, FileBody) and (body.size or 0) > PART_BYTES:
                self._in_parts(location, body)
            else:
                self._whole(location, body)
        except UploadError:
            raise
        except Exception as error:
            raise self._failure(error, location) from error

    def give_up(self, url: str) -> None:
        """Have S3 forget the parts that arrived. Best effort."""
        begun = self._state.multipart(url)
        if begun is None:
            return
        location = parse(url)
        self._abort(location, begun.upload_id)
        self._state.multipart_is(url, None)

    def _location(self, url: str) -> Location:
        try:
            location = parse(url)
        except ValueError as error:
            raise UploadError(str(error)) from None
        if not is_allowed(self._access.write, location):
            raise UploadError("the operator does not allow results there (the node's setting cloud.write)")
        return location

    def _client(self) -> Any:
        if self._made is None:
            self._made = make_client(self._access, self._keys, self._timeout_s)
        return self._made

    def _whole(self, location: Location, body: Body) -> None:
        size = body.size or 0
        if isinstance(body, FileBody):
            stream = self._stream(body, 0, size)
        else:
            data = b"".join(body.chunks(1 << 20))
            size = len(data)
            stream = self._stream(_Bytes(data), 0, size)
        client = self._client()
        with stream.failures():
            client.put_object(
                Bucket=location.bucket,
                Key=location.key,
                Body=stream,
                ContentLength=size,
                ContentType="application/json" if isinstance(body, BytesBody) else body.content_type,
            )
        if isinstance(body, FileBody):
            body.sha256 = stream.digest.hexdigest()

    def _in_parts(self, location: Location, body: FileBody) -> None:
        client, where = self._client(), {"Bucket": location.bucket, "Key": location.key}
        status, size = body.status, body.status.st_size
        begun = self._state.multipart(location.url)
        if begun is None or (begun.size, begun.mtime_ns) != (size, status.st_mtime_ns):
            self._abort_all(location)
            made = client.create_multipart_upload(**where, ContentType=body.content_type)
            least = -(-size // MAX_PARTS)
            begun = Multipart(
                upload_id=made["UploadId"],
                size=size,
                mtime_ns=status.st_mtime_ns,
                part_bytes=max(PART_BYTES, least),
            )
            self._state.multipart_is(location.url, begun)
        digest = hashlib.sha256() if not begun.etags else None
        try:
            for at in range(len(begun.etags) * begun.part_bytes, size, begun.part_bytes):
                stream = self._stream(body, at, min(begun.part_bytes, size - at), digest)
                with stream.failures():
                    part = client.upload_part(
                        **where,
                        UploadId=begun.upload_id,
                        PartNumber=len(begun.etags) + 1,
                        Body=stream,
                        ContentLength=stream.size,
                    )
                digest = stream.digest if digest is not None else None
                begun = msgspec.structs.replace(begun, etags=(*begun.etags, part["ETag"]))
                self._state.multipart_is(location.url, begun)
            parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(begun.etags, 1)]
            client.complete_multipart_upload(**where, UploadId=begun.upload_id, MultipartUpload={"Parts": parts})
        except Exception as error:
            if error_of(error, location, self._access).code == "NoSuchUpload":  # it expired, or completed unseen
                self._state.multipart_is(location.url, None)
                raise TryAgain("S3 has forgotten the parts that had arrived") from error
            raise
        self._state.multipart_is(location.url, None)
        body.sha256 = "" if digest is None else digest.hexdigest()

    def _abort_all(self, location: Location) -> None:
        """Forget parts of this object that a delivery left which was killed for good: nobody else writes it."""
        try:
            found = self._client().list_multipart_uploads(Bucket=location.bucket, Prefix=location.key)
        except S3Error:
            raise
        except Exception as error:  # noqa: BLE001 - a right that the node may lack
            log.info("uploads in parts not listed: %s", error_of(error, location, self._access))
            return
        for each in found.get("Uploads", ()):
            if each["Key"] == location.key:
                self._abort(location, each["UploadId"])

    def _abort(self, location: Location, upload_id: str) -> None:
        try:
            self._client().abort_multipart_upload(Bucket=location.bucket, Key=location.key, UploadId=upload_id)
        except Exception as error:  # noqa: BLE001 - best effort; a rule of the bucket removes the rest
            log.warning("upload in parts not aborted: %s", error_of(error, location, self._access))

    def _stream(self, body: FileBody | _Bytes, at: int, size: int, digest: Any = None) -> _Stream:
        return _Stream(body, at, size, self._throttle, self._deadline, self._progress, digest)

    def _failure(self, error: Exception, location: Location) -> UploadError:
        found = error_of(error, location, self._access)
        text = str(found)
        if found.may_pass:
            return TryAgain(text, found.status, patience=None if found.kind == "passing" else _REFUSED)
        return UploadError(text, found.status)


class _Bytes:
    """Bytes in memory, read like a file."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_at(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]


class _Stream:
    """A range of a body, as botocore reads it: throttled, with progress, and not past a deadline."""

    def __init__(  # noqa: PLR0917
        self,
        body: FileBody | _Bytes,
        at: int,
        size: int,
        throttle: Throttle,
        deadline: float,
        progress: Callable[[int], None],
        digest: Any,
    ) -> None:
        self.size = size
        self._body = body
        self._begin = at
        self._throttle = throttle
        self._deadline = deadline
        self._progress = progress
        self._before = hashlib.sha256() if digest is None else digest
        """Of what comes before the range."""
        self.digest = self._before.copy()
        self._done = 0
        self._failure: UploadError | None = None

    def __len__(self) -> int:
        return self.size

    def tell(self) -> int:
        return self._done

    def seek(self, offset: int, whence: int = 0) -> int:
        """To the beginning, for another request, or anywhere without reading, for the length."""
        self._done = offset + (0, self._done, self.size)[whence]
        if self._done == 0:
            self.digest = self._before.copy()
        return self._done

    def read(self, size: int = -1) -> bytes:
        left = self.size - self._done
        wanted = left if size is None or size < 0 else min(size, left)
        wanted = min(wanted, self._throttle.chunk_bytes(_CHUNK_BYTES))
        if not wanted:
            return b""
        try:
            if time.monotonic() >= self._deadline:
                raise TryAgain(f"the delivery's time was up after {self._begin + self._done} bytes")
            data = self._body.read_at(self._begin + self._done, wanted)
        except UploadError as error:
            self._failure = error
            raise
        self._throttle.take(len(data))
        self.digest.update(data)
        self._done += len(data)
        self._progress(self._begin + self._done)
        return data

    @contextlib.contextmanager
    def failures(self) -> Any:
        """What reading raised is raised as it is: botocore takes it for a broken connection."""
        try:
            yield
        except Exception as error:
            if self._failure is not None:
                raise self._failure from error
            raise
