"""Sends bodies to one destination until each is accepted, refused for good, or the time is up.

Bodies are streamed: memory use does not depend on their size, and each attempt reads them again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from flowmesh.backoff import Backoff
from flowmesh.messages.output import HttpDestination
from flowmesh.redaction import Redactor, bare_url
from flowmesh.results.http_attempt import HttpClient
from flowmesh.results.request_bodies import Body, TryAgain, UploadError
from flowmesh.results.throttle import Throttle

_LENGTH_NEEDED = frozenset((400, 408, 411))
"""Answers of servers that do not accept a body of unknown length, or waited too long for its end."""


class Uploader:
    """One destination's requests.

    Args:
        deadline: on the monotonic clock; no attempt starts after it, and no transfer continues past it.
        token: the node's bearer token, for requests to `orchestrator_url`'s origin without an Authorization header.
        first_backoff_s, max_backoff_s: the wait after a failed attempt doubles from the one up to the other.
        progress: called with the number of bytes of the current body sent so far; starts at 0 with each attempt.
    """

    def __init__(
        self,
        destination: HttpDestination,
        *,
        deadline: float,
        throttle: Throttle,
        token: str | None = None,
        orchestrator_url: str | None = None,
        first_backoff_s: float = 0.5,
        max_backoff_s: float = 30.0,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        if destination.url is None:
            raise UploadError("the http destination has no url")
        self._deadline = deadline
        self._first_backoff_s = first_backoff_s
        self._max_backoff_s = max_backoff_s
        self._redact = Redactor.of_request(destination.url, destination.headers, token)
        self._client = HttpClient(
            destination,
            deadline=deadline,
            throttle=throttle,
            token=token,
            orchestrator_url=orchestrator_url,
            progress=progress,
            redact=self._redact,
        )

    def close(self) -> None:
        self._client.close()

    def send(self, method: str, url: str, body: Body) -> None:
        """Send `body`, again after each failure that may pass, waiting as long as the server's Retry-After asks for.

        Raises:
            UploadError: it was refused, or time is up. One line, secrets hidden.
        """
        started = time.monotonic()
        backoff = Backoff(self._first_backoff_s, self._max_backoff_s)
        attempts, last_answer = 0, ""
        while True:
            attempts += 1
            try:
                self._client.attempt(method, url, body)
                return
            except TryAgain as error:
                if error.status is not None:
                    last_answer = str(error)
                wait_s = max(error.retry_after_s, backoff.next_s())
                if time.monotonic() + wait_s >= self._deadline:
                    text = str(error)
                    if error.status is None and last_answer:
                        text += f"; before that {last_answer}"
                    text += f"; gave up after {time.monotonic() - started:.0f} s and {attempts} attempts"
                    raise self._error(method, url, text, error.status) from None
            except UploadError as error:
                raise self._error(method, url, str(error), error.status) from None
            time.sleep(wait_s)

    def try_unsized(self, url: str, body: Body) -> bool:
        """One attempt with a body of unknown length (chunked encoding).

        Returns:
            Whether it was accepted. If not, sending it with its length may succeed.

        Raises:
            UploadError: the server refused it for a reason that its length does not change.
        """
        try:
            self._client.attempt("POST", url, body)
        except UploadError as error:
            if isinstance(error, TryAgain) or error.status in _LENGTH_NEEDED:
                return False
            raise self._error("POST", url, str(error), error.status) from None
        return True

    def _error(self, method: str, url: str, text: str, status: int | None) -> UploadError:
        return UploadError(self._redact(f"{method} {bare_url(url)}: {text}"), status)
