"""Asks the node's gateway, which fetches from the orchestrator with the node's token: this process never has it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flowmesh.messages.gateway import ERROR, KEY, TIMEOUT, Gateway

if TYPE_CHECKING:
    import requests

_UNIX = "flowmesh+unix://gateway"
_ANSWER_S = 5.0
"""The gateway waits for the orchestrator as long as the task asks for; this much longer for its own answer."""


class NotAnswered(Exception):
    """Raised where the gateway could not ask the orchestrator; another try may succeed."""


def get(gateway: Gateway, url: str, headers: Mapping[str, str], timeout_s: float) -> requests.Response:
    """The orchestrator's answer to a GET for `url`, which is of its origin.

    Raises:
        NotAnswered: it gave none.
        requests.RequestException: the gateway cannot be reached.
    """
    import requests

    parts = urlsplit(url)
    session = requests.Session()
    session.trust_env = False
    session.mount(_UNIX, _unix_adapter(gateway.socket))
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    answer = session.get(
        f"{_UNIX}{path}",
        headers={**headers, KEY: gateway.key, TIMEOUT: f"{timeout_s:g}"},
        stream=True,
        timeout=timeout_s + _ANSWER_S,
        allow_redirects=False,
    )
    if (why := answer.headers.get(ERROR)) is not None:
        answer.close()
        raise NotAnswered(why)
    return answer


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
