"""`redis+sentinel://USER:PASSWORD@HOST:PORT,HOST:PORT/SERVICE/DB`: the address of a Redis that sentinels monitor.

User and password are for the Redis server; the sentinels are asked without a login.
"""

from __future__ import annotations

import msgspec

SENTINEL_SCHEME = "redis+sentinel"
SENTINEL_FORM = f"{SENTINEL_SCHEME}://HOST:PORT,HOST:PORT/SERVICE/DB"
SENTINEL_PORT = 26379


class SentinelAddress(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of such a URL. `hosts` are the sentinels, with their ports."""

    hosts: list[tuple[str, int]]
    service: str
    db: int = 0
    username: str | None = None
    password: str | None = None


def is_sentinel(url: str) -> bool:
    return url.partition("://")[0].lower() == SENTINEL_SCHEME


def sentinel_address(url: str) -> SentinelAddress:
    """Parse such a URL.

    Raises:
        ValueError: it is wrong. The text describes how, and contains no part of the URL (a password may be in it).
    """
    from urllib.parse import unquote  # makes a third of this module's import time

    rest = url.partition("://")[2]
    if not rest.isprintable() or " " in rest:
        raise ValueError("a character that a URL cannot contain")
    if "?" in rest or "#" in rest:
        raise ValueError("a bare # or ?")
    authority, _, path = rest.partition("/")
    login, at, places = authority.rpartition("@")
    username, _, password = login.partition(":")
    if "@" in login or ":" in password:
        raise ValueError("a user name or password that is not escaped")
    service, _, db = path.partition("/")
    if not service:
        raise ValueError("no service name")
    if db and not (db.isascii() and db.isdigit()):
        raise ValueError("a database that is not a number")
    return SentinelAddress(
        hosts=[_host(place) for place in places.split(",")],
        service=unquote(service),
        db=int(db or 0),
        username=unquote(username) or None,
        password=unquote(password) if at and password else None,
    )


def _host(place: str) -> tuple[str, int]:
    if place.startswith("["):  # IPv6
        host, bracket, port = place[1:].partition("]")
        port = port.removeprefix(":") if bracket else "?"
    else:
        host, _, port = place.partition(":")
    if not host:
        raise ValueError("an empty host")
    try:
        host.encode("idna")  # as the socket will encode it
    except UnicodeError:
        raise ValueError("a host that cannot be used") from None
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError("a port that is not a number from 1 to 65535")
    return host, int(port or SENTINEL_PORT)
