"""Sends bodies to one destination until each is accepted, refused for good, or the time is up.

Bodies are streamed: memory use does not depend on their size, and each attempt reads them again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from flowmesh.backoff import Backoff
from flowmesh.messages.output import HttpDestination, Remote
from flowmesh.redaction import Redactor, bare_url
from flowmesh.results.delivery_state import DeliveryState, Tries
from flowmesh.results.http_attempt import HttpClient
from flowmesh.results.request_bodies import Body, Postponed, TryAgain, UploadError
from flowmesh.results.throttle import Throttle
from flowmesh.validation.s3_url import is_s3
from flowmesh.web.origins import shown_origin

_LENGTH_NEEDED = frozenset((400, 408, 411))
"""Answers of servers that do not accept a body of unknown length, or waited too long for its end."""


class Client(Protocol):
    """Makes single attempts; see `http_attempt.HttpClient`."""

    def attempt(self, method: str, url: str, body: Body) -> None: ...
    def give_up(self, url: str) -> None:
        """No further attempt at this request will be made."""

    def close(self) -> None: ...


class Uploader:
    """One destination's requests.

    Args:
        deadline: on the monotonic clock; no attempt starts after it, and no transfer continues past it.
        token: the node's bearer token, for requests to `orchestrator_url`'s origin without an Authorization header.
        first_backoff_s, max_backoff_s: the wait after a failed attempt doubles from the one up to the other.
        progress: called with the number of bytes of the current body sent so far; starts at 0 with each attempt.
        token_expected: whether a token that is missing now is waited for.
        postpone: where failed attempts are saved; waits then end `send`. None: `send` sleeps.
        client: makes the attempts; None: one for HTTP.
    """

    def __init__(
        self,
        destination: Remote,
        *,
        deadline: float,
        throttle: Throttle,
        token: str | None = None,
        orchestrator_url: str | None = None,
        first_backoff_s: float = 0.5,
        max_backoff_s: float = 30.0,
        progress: Callable[[int], None] = lambda _: None,
        token_expected: bool = False,
        postpone: DeliveryState | None = None,
        client: Client | None = None,
    ) -> None:
        if destination.url is None:
            raise UploadError("the http destination has no url")
        self._deadline = deadline
        self._first_backoff_s = first_backoff_s
        self._max_backoff_s = max_backoff_s
        self._postpone = postpone
        http = destination if isinstance(destination, HttpDestination) else HttpDestination(url=destination.url)
        self._redact = Redactor.of_request(destination.url, http.headers, token)
        self._client: Client = client or HttpClient(
            http,
            deadline=deadline,
            throttle=throttle,
            token=token,
            orchestrator_url=orchestrator_url,
            progress=progress,
            redact=self._redact,
            token_expected=token_expected,
        )

    def close(self) -> None:
        self._client.close()

    def send(self, method: str, url: str, body: Body) -> None:
        """Send `body`, again after each failure that may pass, waiting as long as the server's Retry-After asks for.

        Raises:
            UploadError: it was refused, or time is up. One line, secrets hidden.
            Postponed: another attempt is due later, and waits are not ours.
        """
        try:
            self._send(method, url, body)
        except Postponed:
            raise
        except UploadError:
            self._client.give_up(url)
            raise

    def _send(self, method: str, url: str, body: Body) -> None:
        request = f"{method} {_shown(url)}"
        tries = Tries(request=request) if self._postpone is None else self._postpone.tries_of(request)
        first_s = min(self._first_backoff_s * 2 ** min(tries.attempts, 32), self._max_backoff_s)
        backoff = Backoff(first_s, self._max_backoff_s)
        began = time.monotonic() - tries.spent_s
        while True:
            tries.attempts += 1
            try:
                self._client.attempt(method, url, body)
                return
            except TryAgain as error:
                wait_s = max(error.retry_after_s, backoff.next_s())
                tries.spent_s = time.monotonic() - began
                over = _is_over(tries, error, wait_s)
                if over or time.monotonic() + wait_s >= self._deadline:
                    text = str(error)
                    if error.status is None and tries.last_answer:
                        text += f"; before that {tries.last_answer}"
                    text += f"; gave up after {tries.spent_s:.0f} s and {tries.attempts} attempts"
                    raise self._error(method, url, text, error.status) from None
                if error.status is not None:
                    tries.last_answer = self._redact(str(error))
                failure = self._error(method, url, str(error), error.status)
            except UploadError as error:
                raise self._error(method, url, str(error), error.status) from None
            self._wait(url, tries, wait_s, failure)

    def _wait(self, url: str, tries: Tries, wait_s: float, failure: UploadError) -> None:
        """Sleep, or save what has happened and leave the waiting to our caller."""
        if self._postpone is None:
            time.sleep(wait_s)
            return
        tries.spent_s += wait_s
        self._postpone.postponed(tries, self._deadline - time.monotonic() - wait_s)
        raise Postponed(
            str(failure), failure.status, again_in_s=wait_s, attempts=tries.attempts, origin=shown_origin(url)
        )

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
        return UploadError(self._redact(f"{method} {_shown(url)}: {text}"), status)


def _is_over(tries: Tries, error: TryAgain, wait_s: float) -> bool:
    """Whether failures of this kind have lasted longer than they may."""
    kind = "" if error.patience is None else error.patience.kind
    if kind != tries.kind:
        tries.kind, tries.kind_since_s = kind, tries.spent_s
    return error.patience is not None and tries.spent_s + wait_s - tries.kind_since_s > error.patience.limit_s


def _shown(url: str) -> str:
    return url if is_s3(url) else bare_url(url)
