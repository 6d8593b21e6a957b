"""Sends one body to one address until it is accepted, refused for good, or time is up.

Bodies are streamed: memory does not grow with them, and each attempt reads them anew. Secrets go to the origin they
were meant for and nowhere else: not across a redirect, not into an error's text.
"""

from __future__ import annotations

import base64
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit

from flowmesh import __version__
from flowmesh.errors import FieldError
from flowmesh.messages.output import HttpDestination, check_url
from flowmesh.redaction import Redactor, bare_url
from flowmesh.results.answers import ANSWER_SHOWN, answer_of, in_words, innermost, retry_after_s
from flowmesh.results.bodies import Body, UploadError
from flowmesh.results.throttle import Throttle

if TYPE_CHECKING:
    import requests
    import tenacity

CHUNK_BYTES = 64 * 1024
MAX_REDIRECTS = 5
_TRY_AGAIN = frozenset((408, 425, 429))
_LENGTH_WANTED = frozenset((400, 408, 411))
"""What a server says of a chunked body that it does not take, or took too long for."""


class _TryAgain(UploadError):
    """An attempt failed in a way that another may not."""

    def __init__(self, message: str, status: int | None = None, retry_after_s: float = 0.0) -> None:
        super().__init__(message, status)
        self.retry_after_s = retry_after_s


class Uploader:
    """One destination's requests.

    Args:
        deadline: on the monotonic clock; no attempt starts after it, and no transfer goes on past it.
        token: the node's bearer token, for requests to `orchestrator_url`'s origin that have no Authorization.
        progress: told how many bytes of the current body have left, again from 0 at each attempt.
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
            raise UploadError("an http destination without an address")
        self._timeout_s = destination.timeout_s
        self._custom = {k: v.strip() for k, v in destination.headers.items() if k.lower() != "content-type"}
        self._deadline = deadline
        self._throttle = throttle
        self._token = token
        self._orchestrator = _origin(orchestrator_url) if orchestrator_url else None
        self._first_backoff_s = first_backoff_s
        self._max_backoff_s = max_backoff_s
        self._progress = progress
        self._redact = Redactor.of_request(destination.url, destination.headers, token)
        self._session: requests.Session | None = None

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def send(self, method: str, url: str, body: Body) -> None:
        """Send `body`, again and again while that makes sense.

        Raises:
            UploadError: it was refused, or time is up. One line, secrets hidden.
        """
        import tenacity

        started = time.monotonic()
        first_s = self._first_backoff_s
        backoff = tenacity.wait_combine(
            tenacity.wait_exponential(multiplier=first_s, max=self._max_backoff_s), tenacity.wait_random(0, first_s)
        )
        waits_s: dict[int, float] = {}
        last_answer = ""

        def wait_s(state: tenacity.RetryCallState) -> float:
            nonlocal last_answer
            error = state.outcome.exception() if state.outcome is not None else None
            if isinstance(error, UploadError) and error.status is not None:
                last_answer = str(error)
            asked = error.retry_after_s if isinstance(error, _TryAgain) else 0.0
            return waits_s.setdefault(state.attempt_number, max(asked, backoff(state)))

        def too_late(state: tenacity.RetryCallState) -> bool:
            return time.monotonic() + wait_s(state) >= self._deadline

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TryAgain),
            wait=wait_s,
            stop=too_late,
            reraise=True,
        )
        try:
            retrying(self._attempt, method, url, body)
        except UploadError as error:
            told = f"{method} {bare_url(url)}: {error}"
            if isinstance(error, _TryAgain):
                tries = retrying.statistics.get("attempt_number", 1)
                if error.status is None and last_answer:
                    told += f"; before that {last_answer}"
                told += f"; gave up after {time.monotonic() - started:.0f} s and {tries} attempts"
            raise UploadError(self._redact(told), error.status) from None

    def try_unsized(self, url: str, body: Body) -> bool:
        """One attempt with a body whose length is not known yet (a chunked one); whether it was accepted.

        Where it was not, sending it with its length is worth a try.

        Raises:
            UploadError: the server refused it for another reason, which would stand then, too.
        """
        try:
            self._attempt("POST", url, body)
        except UploadError as error:
            if isinstance(error, _TryAgain) or error.status in _LENGTH_WANTED:
                return False
            raise UploadError(self._redact(f"POST {bare_url(url)}: {error}"), error.status) from None
        return True

    # ---- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(self, method: str, url: str, body: Body) -> None:
        first = _origin(url)
        at_home = True  # once a redirect has left the first origin, nothing secret is sent any more
        for _ in range(MAX_REDIRECTS + 1):
            at_home = at_home and _origin(url) == first
            kind = _Stream if body.size is None else _SizedStream
            stream = kind(body, self._throttle, self._deadline, self._progress)
            response = self._request(method, url, stream, self._headers(url, body, at_home))
            try:
                status = response.status_code
                if 200 <= status < 300:
                    if not stream.whole:
                        raise _TryAgain(f"the server answered {status} before it had read everything", status)
                    return
                if status not in {307, 308}:
                    raise self._refusal(response)
                url = self._next(url, response)
            finally:
                response.close()
        raise UploadError(f"more than {MAX_REDIRECTS} redirects")

    def _headers(self, url: str, body: Body, at_home: bool) -> dict[str, str]:
        headers: dict[str, str] = {"User-Agent": f"flowmesh-supervisor/{__version__}", "Accept": "*/*"}
        if at_home:
            # names differ in case only: the destination's own replace ours
            custom = {name.lower() for name in self._custom}
            headers = {k: v for k, v in headers.items() if k.lower() not in custom} | self._custom
            if "authorization" not in custom:
                if (own := _userinfo(url)) is not None:
                    headers["Authorization"] = own
                elif self._token and _origin(url) == self._orchestrator:
                    headers["Authorization"] = f"Bearer {self._token}"
        headers["Content-Type"] = body.content_type
        return headers

    def _request(self, method: str, url: str, stream: _Stream, headers: Mapping[str, str]) -> requests.Response:
        import requests
        import requests.utils

        session = self._session
        if session is None:
            session = self._session = requests.Session()
            session.trust_env = False  # it would also send what ~/.netrc has for the host
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise _TryAgain("no time is left")
        timeout_s = min(self._timeout_s, left_s)
        plain = _without_userinfo(url)
        try:
            return session.request(
                method,
                plain,
                data=stream,
                headers=dict(headers),
                timeout=(timeout_s, timeout_s),
                proxies=requests.utils.get_environ_proxies(plain),
                verify=os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True,
                allow_redirects=False,
                stream=True,
            )
        except requests.exceptions.RequestException as error:
            cause = innermost(error)
            told = in_words(error, cause, timeout_s)
            again = isinstance(error, requests.exceptions.ConnectionError | requests.exceptions.Timeout)
            if again and not isinstance(cause, ssl.SSLCertVerificationError):
                raise _TryAgain(told) from error
            raise UploadError(told) from error

    def _refusal(self, response: requests.Response) -> UploadError:
        status = response.status_code
        told = f"the server answered {status} {response.reason or ''}".rstrip()
        if 300 <= status < 400:
            return UploadError(f"{told}: only 307 and 308 keep a body; give the address it redirects to", status)
        shown = "".join(c if c.isprintable() else " " for c in self._redact(answer_of(response, self._timeout_s)))
        answer = " ".join(shown.split())
        if answer:
            told += f": {answer[:ANSWER_SHOWN]}"
        if status in _TRY_AGAIN or status >= 500:
            return _TryAgain(told, status, retry_after_s(response.headers.get("Retry-After")))
        return UploadError(told, status)

    @staticmethod
    def _next(url: str, response: requests.Response) -> str:
        status = response.status_code
        location = response.headers.get("Location")
        if not location:
            raise UploadError(f"the server answered {status} without a Location", status)
        target = urljoin(url, location)
        try:
            check_url(target, "Location")
        except FieldError as error:
            raise UploadError(f"the server answered {status} with a bad address: {error}", status) from None
        return target


class _Stream:
    """A body as `requests` takes it: read as it is sent, and without a length, chunked."""

    def __init__(self, body: Body, throttle: Throttle, deadline: float, progress: Callable[[int], None]) -> None:
        self._body = body
        self._throttle = throttle
        self._deadline = deadline
        self._progress = progress
        self.whole = False
        """Whether all of it has left."""

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        for chunk in self._body.chunks(self._throttle.chunk_bytes(CHUNK_BYTES)):
            if time.monotonic() >= self._deadline:
                raise _TryAgain(f"time was up after {sent} of {self._body.size} bytes")
            self._throttle.take(len(chunk))
            yield chunk
            sent += len(chunk)
            self._progress(sent)
        self.whole = True


class _SizedStream(_Stream):
    """It has a length, so no chunked encoding."""

    def __len__(self) -> int:
        return self._body.size or 0


# ---- small things ----------------------------------------------------------------------------------------------------


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)


def _userinfo(url: str) -> str | None:
    parts = urlsplit(url)
    if parts.username is None:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _without_userinfo(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
