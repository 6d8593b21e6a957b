"""What every request passes first: method, Host, origin, size, token. And the headers of each answer."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowmesh.errors import ConfigError
from flowmesh.page.tokens import COOKIE, Tokens

LOGIN = "/login"
HEALTH = "/healthz"
STATIC = "/static/"
OPEN = (LOGIN, HEALTH)
"""What needs no token. Without one, /healthz says nothing but its status."""
MOST_BODY = 4096
MOST_HEADERS = 16 * 1024
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with no-referrer a browser names no origin for the login
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
log = logging.getLogger("flowmesh.page")


class Guard:
    """
    Args:
        listens: the host of `web.listen`.
        hosts: `web.hosts`.
    """

    def __init__(self, app: ASGIApp, *, tokens: Tokens, listens: str, hosts: Iterable[str]) -> None:
        self._app = app
        self._tokens = tokens
        own = ("localhost", listens, socket.gethostname(), socket.getfqdn(), *hosts)
        self._hosts = frozenset(name.lower().rstrip(".") for name in own)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        response = self._refusal(request)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await (self._app if response is None else response)(scope, receive, send_guarded)

    def _refusal(self, request: Request) -> Response | None:
        if not self._is_host(request.headers.getlist("host")):
            return PlainTextResponse("unknown Host; add the name to web.hosts\n", 421)
        path = request.url.path
        if request.method not in ("GET", "HEAD") and not (request.method == "POST" and path == LOGIN):
            return PlainTextResponse("only GET and HEAD\n", 405, {"allow": "GET, HEAD"})
        if self._is_foreign(request):
            return PlainTextResponse("requests of other sites are refused\n", 403)
        if not self._is_small(request):
            return PlainTextResponse("the request is too large\n", 413)
        try:
            return self._unknown(request)
        except ConfigError as error:
            log.warning("%s", error)
            return PlainTextResponse("the token cannot be read: see `flowmesh doctor` on the node\n", 503)

    def _unknown(self, request: Request) -> Response | None:
        """The answer to a visitor without the token; None for others."""
        request.scope["known"] = True
        if not self._tokens.needed:
            return None
        if (cookie := request.cookies.get(COOKIE)) and self._tokens.is_cookie(cookie):
            return None
        address = request.client.host if request.client is not None else ""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            if self._tokens.blocked(address):
                return PlainTextResponse("too many wrong tokens; wait a minute\n", 429, {"retry-after": "60"})
            if self._tokens.is_right(given.strip(), address):
                return None
        request.scope["known"] = False
        if request.url.path in OPEN or request.url.path.startswith(STATIC):
            return None
        if "text/html" in request.headers.get("accept", "") and not kind:
            return RedirectResponse(LOGIN, 303)
        return JSONResponse({"error": "a token is needed"}, 401, {"www-authenticate": "Bearer"})

    def _is_host(self, given: list[str]) -> bool:
        """Whether it is a name of ours, or an address: a foreign name that resolves to us is an attack by DNS."""
        if len(given) != 1:
            return False
        try:
            host = (urlsplit(f"//{given[0]}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if host in self._hosts:
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def _is_foreign(self, request: Request) -> bool:
        """A request that another site makes a browser send. A link that somebody follows is none."""
        headers = request.headers
        if (origin := headers.get("origin")) is not None and origin.partition("://")[2] != headers.get("host"):
            return True
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return False
        followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        return not (followed and request.method == "GET" and not request.url.path.startswith("/api/"))

    def _is_small(self, request: Request) -> bool:
        length = request.headers.get("content-length", "0")
        if sum(len(name) + len(value) for name, value in request.headers.raw) > MOST_HEADERS:
            return False
        if "transfer-encoding" in request.headers or not length.isdecimal() or len(length) > 9:
            return False
        return int(length) <= (MOST_BODY if request.method == "POST" else 0)
