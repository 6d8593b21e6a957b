"""When the next request may be sent: requests and tokens a minute, and the endpoint's own Retry-After."""

from __future__ import annotations

import time
from collections.abc import Callable

MINUTE_S = 60.0


class Pace:
    """Spreads requests evenly, without bursts: a window of any minute has no more than was asked for.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(
        self, requests: int | None, tokens: int | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._requests = requests
        self._tokens = tokens
        self._clock = clock
        self._next_request = self._next_tokens = self._open_at = clock()

    def take(self, tokens: int) -> float:
        """Reserve the next place; returns the seconds until then.

        Args:
            tokens: an estimate of the request's, corrected by `correct`.
        """
        now = self._clock()
        start = max(now, self._next_request, self._next_tokens, self._open_at)
        if self._requests is not None:
            self._next_request = start + MINUTE_S / self._requests
        if self._tokens is not None:
            self._next_tokens = start + tokens * MINUTE_S / self._tokens
        return start - now

    def correct(self, estimated: int, used: int) -> None:
        """Take what a request really used into account."""
        if self._tokens is not None:
            self._next_tokens += (used - estimated) * MINUTE_S / self._tokens

    def pause(self, seconds: float) -> None:
        """No request for so long: the endpoint asked for it."""
        self._open_at = max(self._open_at, self._clock() + seconds)

    @property
    def paused_s(self) -> float:
        """Seconds until requests may be sent again after `pause`."""
        return max(self._open_at - self._clock(), 0.0)
