"""Which certificate authorities the agents' clients trust: the same for endpoints, MCP servers, pages and searches.

Their libraries differ: requests reads REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE, httpx and OpenSSL read SSL_CERT_FILE and
SSL_CERT_DIR, and each has another default.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from runners.api import RunnerError

VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""The first that is set decides. Each may name a file or a folder."""


def authorities() -> str | None:
    """The file or folder that the environment names.

    Raises:
        RunnerError: it does not exist.
    """
    for name in VARIABLES:
        if value := os.environ.get(name):
            if not Path(value).exists():
                raise RunnerError(f"{name} is {value!r}, which does not exist; name certificates, or unset it")
            return value
    return None


def context() -> ssl.SSLContext:
    """A client's TLS context with those authorities, else with the system's and certifi's.

    Raises:
        RunnerError: what the environment names does not exist, or holds no certificates.
    """
    named = authorities()
    if named is None:
        made = ssl.create_default_context()
        if not made.cert_store_stats()["x509_ca"]:  # a system without certificates, or with a folder of them
            import certifi

            made.load_verify_locations(certifi.where())
        return made
    try:
        if Path(named).is_dir():
            return ssl.create_default_context(capath=named)
        return ssl.create_default_context(cafile=named)
    except ssl.SSLError as error:
        raise RunnerError(f"{named!r} holds no certificates that can be read ({error.reason})") from None


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
