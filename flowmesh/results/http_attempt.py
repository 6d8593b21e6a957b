"""One attempt to send a body: headers, redirects, and what the answer means for another attempt.

Credentials are sent to the origin that they are meant for and to no other, also across redirects.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from flowmesh import installed
from flowmesh.errors import FieldError
from flowmesh.messages.output import HttpDestination, check_url
from flowmesh.results.body_stream import BodyStream, SizedBodyStream
from flowmesh.results.http_errors import (
    TEXT_SHOWN,
    describe_failure,
    innermost,
    is_unresolved,
    read_text,
    reported_error,
    retry_after_s,
)
from flowmesh.results.request_bodies import Body, Patience, TryAgain, UploadError
from flowmesh.results.throttle import Throttle
from flowmesh.web.origins import basic_auth, exact_origin, refusal_hint, why_no_token, without_login
from flowmesh.web.session import make_session, options_for

if TYPE_CHECKING:
    import requests

MAX_REDIRECTS = 5
_RETRYABLE = frozenset((408, 425, 429))
"""Besides 5xx."""
_UNRESOLVED = Patience("unresolved", 120.0)
"""A name that nobody knows is rather a mistake than an outage."""
_TOKEN_REFUSED = Patience("token", 900.0)
"""The orchestrator got a new token and this node has not yet, or the other way round."""


class HttpClient:
    """Sends bodies to one destination, one attempt a call. The arguments are those of `upload.Uploader`.

    Args:
        redact: hides secrets in a server's answer.
    """

    def __init__(
        self,
        destination: HttpDestination,
        *,
        deadline: float,
        throttle: Throttle,
        token: str | None,
        orchestrator_url: str | None,
        progress: Callable[[int], None],
        redact: Callable[[str], str],
        token_expected: bool = False,
    ) -> None:
        self._timeout_s = destination.timeout_s
        self._custom = {k: v.strip() for k, v in destination.headers.items() if k.lower() != "content-type"}
        self._deadline = deadline
        self._throttle = throttle
        self._token = token
        self._token_expected = token_expected or token is not None
        self._orchestrator_url = orchestrator_url
        self._progress = progress
        self._redact = redact
        self._session: requests.Session | None = None

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def give_up(self, url: str) -> None:
        """Nothing is left at the server."""

    def attempt(self, method: str, url: str, body: Body) -> None:
        """Send `body` once, following redirects.

        Raises:
            TryAgain: it was not accepted, and another attempt may succeed.
            UploadError: it was refused for good.
        """
        first = exact_origin(url)
        # Once a redirect has left the first origin, the task's credentials are sent no more; once it has left the
        # orchestrator's, which has several spellings on this machine, the node's token.
        same_origin = with_token = True
        for _ in range(MAX_REDIRECTS + 1):
            same_origin = same_origin and exact_origin(url) == first
            with_token = with_token and not self._why_no_token(url)
            kind = BodyStream if body.size is None else SizedBodyStream
            stream = kind(body, self._throttle, self._deadline, self._progress)
            response = self._request(
                method, url, stream, self._headers(url, body, same_origin=same_origin, with_token=with_token)
            )
            try:
                status = response.status_code
                if 200 <= status < 300:
                    if not stream.whole:
                        raise TryAgain(f"the server answered {status} before it had read the whole body", status)
                    if said := reported_error(response, self._timeout_s):
                        text = self._shown(said)
                        raise TryAgain(f"the server answered {status}, and that it failed: {text}", status)
                    return
                if status not in {307, 308}:
                    raise self._refusal(response, url, same_origin=same_origin, with_token=with_token)
                url = _redirect_target(url, response)
            finally:
                response.close()
        raise UploadError(f"more than {MAX_REDIRECTS} redirects")

    def _headers(self, url: str, body: Body, *, same_origin: bool, with_token: bool) -> dict[str, str]:
        headers: dict[str, str] = {"User-Agent": f"flowmesh-supervisor/{installed.version()}", "Accept": "*/*"}
        if same_origin:
            custom = {name.lower() for name in self._custom}  # header names ignore case
            headers = {k: v for k, v in headers.items() if k.lower() not in custom} | self._custom
            if "authorization" not in custom and (login := basic_auth(url)) is not None:
                headers["Authorization"] = login
        if with_token and self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        headers["Content-Type"] = body.content_type
        return headers

    def _why_no_token(self, url: str) -> str:
        return why_no_token(url, self._custom, orchestrator_url=self._orchestrator_url, has_token=self._token_expected)

    def _request(self, method: str, url: str, stream: BodyStream, headers: Mapping[str, str]) -> requests.Response:
        import requests

        session = self._session = self._session or make_session()
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TryAgain("no time is left")
        timeout_s = min(self._timeout_s, left_s)
        plain = without_login(url)
        try:
            return session.request(
                method,
                plain,
                data=stream,
                headers=dict(headers),
                timeout=(timeout_s, timeout_s),
                **options_for(plain),
                allow_redirects=False,
                stream=True,
            )
        except requests.exceptions.RequestException as error:
            cause = innermost(error)
            text = describe_failure(error, cause, timeout_s)
            passing = isinstance(error, requests.exceptions.ConnectionError | requests.exceptions.Timeout)
            if passing and not isinstance(cause, ssl.SSLCertVerificationError):
                patience = _UNRESOLVED if is_unresolved(error, cause) else None
                raise TryAgain(text, patience=patience) from error
            raise UploadError(text) from error

    def _refusal(self, response: requests.Response, url: str, *, same_origin: bool, with_token: bool) -> UploadError:
        status = response.status_code
        text = f"the server answered {status} {response.reason or ''}".rstrip()
        if 300 <= status < 400:
            return UploadError(f"{text}: only 307 and 308 keep a body; give the URL that it redirects to", status)
        if answer := self._shown(read_text(response, self._timeout_s)):
            text += f": {answer}"
        if status in _RETRYABLE or status >= 500:
            return TryAgain(text, status, retry_after_s(response.headers.get("Retry-After")))
        if status in {401, 403}:
            if status == 401 and with_token:
                unread = "the node's token is in a file that cannot be read now"
                sent = "it refuses the node's token" if self._token else unread
                return TryAgain(f"{text}; {sent}", status, patience=_TOKEN_REFUSED)
            if not same_origin and not with_token:
                return UploadError(f"{text}; a redirect led to another origin, which gets no token", status)
            hint = refusal_hint(
                url, self._custom, orchestrator_url=self._orchestrator_url, has_token=self._token_expected
            )
            text += f"; {hint}" if hint else ""
        return UploadError(text, status)

    def _shown(self, answer: str) -> str:
        """An answer's body as part of an error."""
        shown = "".join(c if c.isprintable() else " " for c in self._redact(answer))
        return " ".join(shown.split())[:TEXT_SHOWN]


def _redirect_target(url: str, response: requests.Response) -> str:
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
