"""Parts of a URL that decide what may be sent to it: its origin, and the login it carries."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

Origin = tuple[str, str, int]
"""Scheme, host, port. Credentials for one origin are never sent to another."""

LOOPBACK = "localhost"
"""The host in the origin of every loopback address: they all lead to this machine."""


def origin(url: str) -> Origin:
    parts = urlsplit(url)
    return parts.scheme.lower(), _host(parts.hostname or ""), parts.port or (443 if parts.scheme == "https" else 80)


def exact_origin(url: str) -> Origin:
    """The origin in which each loopback address is its own. Redirects keep credentials only within it."""
    scheme, _, port = origin(url)
    return scheme, (urlsplit(url).hostname or "").lower().removesuffix("."), port


def shown_origin(url: str) -> str:
    """The origin as people write it: scheme://host:port, or s3://bucket."""
    if url.startswith("s3://"):
        return f"s3://{url.removeprefix('s3://').partition('/')[0]}"
    scheme, _, port = origin(url)
    host = (urlsplit(url).hostname or "").lower()
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host name or address is `localhost` or a loopback address."""
    return _host(host) == LOOPBACK


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


def why_no_token(url: str, headers: Mapping[str, str], *, orchestrator_url: str | None, has_token: bool) -> str:
    """Why a request for `url` does not carry the node's token; empty if it does.

    Args:
        headers: those that the task gives.
        has_token: whether the node has a token.
    """
    if any(name.lower() == "authorization" for name in headers):
        return "the task's own Authorization header was sent, not the node's token"
    if basic_auth(url) is not None:
        return "the login in the URL was sent, not the node's token"
    if not has_token:
        return "this node has no token for the orchestrator (delivery.orchestrator_token)"
    if orchestrator_url is None:
        return "the node's token was not sent: delivery.orchestrator_url does not say which address it is for"
    if origin(url) != origin(orchestrator_url):
        return (
            f"the node's token was not sent: it is for {shown_origin(orchestrator_url)} "
            f"(delivery.orchestrator_url) only, and this is {shown_origin(url)}"
        )
    return ""


def refusal_hint(url: str, headers: Mapping[str, str], *, orchestrator_url: str | None, has_token: bool) -> str:
    """What an error about a 401 or 403 adds: why the token did not go, where the node's token is of any interest."""
    elsewhere = orchestrator_url is None or origin(url) != origin(orchestrator_url)
    if elsewhere and not has_token:
        return ""
    return why_no_token(url, headers, orchestrator_url=orchestrator_url, has_token=has_token)


def _host(host: str) -> str:
    host = host.lower().removesuffix(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    mapped = getattr(address, "ipv4_mapped", None)
    return LOOPBACK if (mapped or address).is_loopback else host
