"""The certificate authorities of agents' endpoints, MCP servers and pages: those of `flowmesh.web.session`.

For clients that are not `requests`. httpx reads only the variables of OpenSSL, urllib3 alone none of those of requests.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from flowmesh.web.session import TRUST_VARIABLES
from runners.api import RunnerError

_BUNDLES = TRUST_VARIABLES[:2]
"""REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE. The first that is set decides; a file or a folder."""


def context() -> ssl.SSLContext:
    """A client's TLS context with the authorities that the environment names, else with the system's, else certifi's.

    A new one for each client: urllib3 changes the one that it is given.

    Raises:
        RunnerError: what the environment names does not exist, or holds no certificates.
    """
    for name in _BUNDLES:
        if value := os.environ.get(name):
            return _of(name, value)
    for name in TRUST_VARIABLES:
        if (value := os.environ.get(name)) and not any(Path(each).exists() for each in value.split(os.pathsep)):
            raise _absent(name, value)
    made = ssl.create_default_context()  # reads SSL_CERT_FILE and SSL_CERT_DIR
    if any(os.environ.get(name) for name in TRUST_VARIABLES) or made.cert_store_stats()["x509_ca"]:
        return made
    return ssl.create_default_context(cafile=_certifi())  # a system without certificates, or with a folder of them


def _of(name: str, value: str) -> ssl.SSLContext:
    if not Path(value).exists():
        raise _absent(name, value)
    try:
        if Path(value).is_dir():
            return ssl.create_default_context(capath=value)
        return ssl.create_default_context(cafile=value)
    except ssl.SSLError as error:
        raise RunnerError(f"{name}: {value!r} holds no certificates that can be read ({error.reason})") from None


def _absent(name: str, value: str) -> RunnerError:
    return RunnerError(f"{name} is {value!r}, which does not exist; name certificates, or unset it")


def _certifi() -> str:
    import certifi

    return certifi.where()


def refusal(error: BaseException | None) -> str | None:
    """Why a certificate was refused, if that is what an error is about, at any depth."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message or "verification failed"
        inner = next((each for each in error.args if isinstance(each, BaseException)), None)
        error = error.__cause__ or inner or getattr(error, "reason", None) or error.__context__
        if not isinstance(error, BaseException):
            return None
    return None
