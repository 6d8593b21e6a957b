"""One GET of a download: redirects, what may be sent to whom, and the node's gateway, which adds its token.

A document's own headers go to the first URL's origin and to no other. The node's token goes to the orchestrator's
origin only, in a request that the gateway makes: this process never has it.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import msgspec

from flowmesh.messages.gateway import ERROR, KEY, TIMEOUT, Gateway
from flowmesh.web.origins import basic_auth, origin, refusal_hint, why_no_token, without_login
from flowmesh.web.session import make_session, options_for
from runners.api import BadRequest, Context

MAX_REDIRECTS = 10
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_UNIX = "flowmesh+unix://gateway"


class NotAnswered(Exception):
    """Raised where the gateway could not ask the orchestrator; another try may succeed."""


class Answered(msgspec.Struct, frozen=True):
    """The last answer, after all redirects."""

    response: Any
    """A `requests.Response` whose body is still to be read."""
    url: str
    by_gateway: bool
    """Whether the node's token went along."""
    hint: str
    """What an error about a 401 or 403 adds."""


def get(
    ctx: Context, url: str, where: str, *, custom: Mapping[str, str], own: Mapping[str, str], timeout_s: float
) -> Answered:
    """
    Args:
        custom: the document's headers.
        own: those of the download itself, which go to every origin.
        timeout_s: to connect, and for each read.

    Raises:
        BadRequest: a redirect leads nowhere, or there are too many.
        NotAnswered, requests.RequestException: there is no answer.
    """
    first, at_first = origin(url), True
    for _ in range(MAX_REDIRECTS + 1):
        at_first = at_first and origin(url) == first
        given = dict(custom) if at_first else {}
        permits, gateway = ctx.job.permits, ctx.job.gateway
        known = {"orchestrator_url": permits.orchestrator_url, "has_token": gateway is not None}
        through = gateway if at_first and not why_no_token(url, given, **known) else None  # type: ignore[arg-type]
        if through is not None:
            response = _by_gateway(through, url, {**given, **own}, timeout_s)
        else:
            response = _directly(url, given, own, timeout_s, at_first=at_first)
        if response.status_code not in _REDIRECTS or not response.headers.get("Location"):
            left = "a redirect led to another origin, which gets no credentials"
            hint = refusal_hint(url, given, **known) if at_first else left  # type: ignore[arg-type]
            return Answered(response, url, through is not None, hint)
        response.close()
        url = urljoin(url, response.headers["Location"])
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise BadRequest(f"{where}: it redirects to an address that is not http or https")
    raise BadRequest(f"{where}: more than {MAX_REDIRECTS} redirects")


def _directly(url: str, custom: dict[str, str], own: Mapping[str, str], timeout_s: float, *, at_first: bool) -> Any:
    headers = {**custom, **own}
    login = basic_auth(url) if at_first else None
    if login is not None and not any(name.lower() == "authorization" for name in headers):
        headers["Authorization"] = login
    session = make_session()
    plain = without_login(url)
    return session.get(
        plain, headers=headers, stream=True, timeout=timeout_s, allow_redirects=False, **options_for(plain)
    )


def _by_gateway(gateway: Gateway, url: str, headers: dict[str, str], timeout_s: float) -> Any:
    import requests

    parts = urlsplit(url)
    session = requests.Session()
    session.trust_env = False
    session.mount(_UNIX, _unix_adapter(gateway.socket))
    asked = {**headers, KEY: gateway.key, TIMEOUT: f"{timeout_s:g}"}
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    # The gateway waits as long as the task asks for, and then answers: a little more for its answer.
    response = session.get(f"{_UNIX}{path}", headers=asked, stream=True, timeout=timeout_s + 5, allow_redirects=False)
    if (why := response.headers.get(ERROR)) is not None:
        response.close()
        raise NotAnswered(why)
    return response


def _unix_adapter(path: str) -> Any:
    """An adapter of `requests` for a server on a unix socket."""
    import requests.adapters
    import urllib3
    import urllib3.connection

    class Connection(urllib3.connection.HTTPConnection):
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            self.sock.connect(path)

    class Pool(urllib3.HTTPConnectionPool):
        ConnectionCls = Connection

    class Adapter(requests.adapters.HTTPAdapter):
        def get_connection_with_tls_context(self, *_: Any, **__: Any) -> Any:
            return Pool("gateway")

        def cert_verify(self, *_: Any, **__: Any) -> None:
            pass

        def request_url(self, request: Any, proxies: Any) -> str:  # noqa: ARG002
            return str(request.path_url)

    return Adapter()
