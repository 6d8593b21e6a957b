"""Parts of a URL that decide what may be sent to it: its origin, and the login it carries."""

from __future__ import annotations

import base64
from urllib.parse import unquote, urlsplit

Origin = tuple[str, str, int]
"""Scheme, host, port. Credentials for one origin are never sent to another."""


def origin(url: str) -> Origin:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)


def basic_auth(url: str) -> str | None:
    """The Authorization header for the user and password in a URL; None where it has none."""
    parts = urlsplit(url)
    if parts.username is None:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def without_login(url: str) -> str:
    """The URL as it is requested: without user, password and fragment."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
