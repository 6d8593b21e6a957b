"""Sessions of `requests`: no login from ~/.netrc, proxies and trusted certificates as the environment gives them."""

from __future__ import annotations

import contextlib
import os
import ssl
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import requests

_OF_REQUESTS = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_OF_OPENSSL = ("SSL_CERT_FILE", "SSL_CERT_DIR")
TRUST_VARIABLES = (*_OF_REQUESTS, *_OF_OPENSSL)
"""Each names certificates. All that are named are trusted, in place of those that come with requests."""


def make_session() -> requests.Session:
    """A session for `options_for`. It would otherwise also send the login that ~/.netrc has for a host."""
    import requests

    session = requests.Session()
    session.trust_env = False
    if any(os.environ.get(name) for name in _OF_OPENSSL):
        session.mount("https://", _openssl_adapter())
    return session


def options_for(url: str) -> dict[str, Any]:
    """Keyword arguments of a request for `url`: proxies and trusted certificates of the environment."""
    import requests.utils

    return {"proxies": requests.utils.get_environ_proxies(url), "verify": _bundle() or True}


def trusted_by_path() -> str | bool:
    """What a client that takes one file of certificates trusts: that of the environment, else what comes with it."""
    given = (_bundle(), *(os.environ.get(name, "") for name in _OF_OPENSSL))
    return next((path for path in given if path), True)


def certificate_remedy() -> str:
    """What an error about a server's certificate adds: which certificates are trusted, and how to change that."""
    given = [f"{name}={os.environ[name]}" for name in TRUST_VARIABLES if os.environ.get(name)]
    missing = [text for text in given if not os.path.exists(text.partition("=")[2].split(os.pathsep)[0])]  # noqa: PTH110
    trusted = "those that come with the package requests" if not given else f"those of {', '.join(given)}"
    if missing:
        trusted += f" ({missing[0].partition('=')[0]} names nothing that exists)"
    remedy = "set SSL_CERT_FILE, in the node's environment, to a file with the CA's certificate"
    return f"this node trusts {trusted}; {remedy}"


def _bundle() -> str:
    return next((path for name in _OF_REQUESTS if (path := os.environ.get(name))), "")


def _openssl_adapter() -> requests.adapters.HTTPAdapter:
    """Trusts what OpenSSL does by its variables. `requests` knows neither, and one path only."""
    import requests.adapters

    context = ssl.create_default_context()  # reads both variables
    if bundle := _bundle():
        folder = os.path.isdir(bundle)  # noqa: PTH112
        with contextlib.suppress(OSError):
            context.load_verify_locations(cafile=None if folder else bundle, capath=bundle if folder else None)

    class Adapter(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs, ssl_context=context)

        def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
            return super().proxy_manager_for(proxy, **kwargs, ssl_context=context)

        def get_connection_with_tls_context(self, request: Any, verify: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            return super().get_connection_with_tls_context(request, True, *args, **kwargs)

        def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:  # noqa: ARG002
            super().cert_verify(conn, url, True, cert)  # type: ignore[no-untyped-call]
            conn.ca_certs = conn.ca_cert_dir = None  # requests adds its own certificates

    return Adapter()
