"""A body as `requests` sends it: throttled, with progress, and not past a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from flowmesh.results.request_bodies import Body, TryAgain
from flowmesh.results.throttle import Throttle

CHUNK_BYTES = 64 * 1024


class BodyStream:
    """Iterated once. Without a length, `requests` sends it in chunked encoding.

    Args:
        deadline: on the monotonic clock.
        progress: called with the number of bytes sent so far.
    """

    def __init__(self, body: Body, throttle: Throttle, deadline: float, progress: Callable[[int], None]) -> None:
        self._body = body
        self._throttle = throttle
        self._deadline = deadline
        self._progress = progress
        self.whole = False
        """Whether all of it was sent."""

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        for chunk in self._body.chunks(self._throttle.chunk_bytes(CHUNK_BYTES)):
            if time.monotonic() >= self._deadline:
                raise TryAgain(f"the delivery's time was up after {sent} of {self._body.size} bytes")
            self._throttle.take(len(chunk))
            yield chunk
            sent += len(chunk)
            self._progress(sent)
        self.whole = True


class SizedBodyStream(BodyStream):
    """A body of known length: sent with Content-Length."""

    def __len__(self) -> int:
        return self._body.size or 0
