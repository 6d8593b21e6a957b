"""Checks of the addresses in settings: Redis and the orchestrator. No message shows an address or a password."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from flowmesh.messages.sentinel import SENTINEL_FORM, is_sentinel, sentinel_address
from flowmesh.validation.describe import nearest, quoted

if TYPE_CHECKING:
    from urllib.parse import SplitResult

_ESCAPE = "write / : @ # ? in a user name or password as %2F %3A %40 %23 %3F"

_Options = dict[str, tuple[str, str]]
"""By name: the pattern of its values, and how an error describes them."""
_REDIS_OPTIONS: _Options = {
    "db": (r"[0-9]{1,9}", "a number"),
    "username": (r".+", "a user's name"),
    "password": (r".+", "a password"),
}
_TLS_OPTIONS: _Options = {
    "ssl_ca_certs": (r".+", "a file of certificates"),
    "ssl_ca_path": (r".+", "a folder of certificates"),
    "ssl_cert_reqs": (r"none|optional|required", "none, optional or required"),
    "ssl_certfile": (r".+", "a file with a certificate"),
    "ssl_check_hostname": (r"(?i)true|false|yes|no|1|0", "true or false"),
    "ssl_ciphers": (r".+", "a list of ciphers as OpenSSL writes it"),
    "ssl_keyfile": (r".+", "a file with a key"),
    "ssl_min_version": (r"771|772", "771 (TLS 1.2) or 772 (TLS 1.3)"),
    "ssl_password": (r".+", "the password of ssl_keyfile"),
}
_SETTING_OF_OPTION = {
    "socket_timeout": "redis.timeout_s",
    "socket_connect_timeout": "redis.timeout_s",
    "health_check_interval": "redis.health_check_interval_s",
}
"""Options that the node passes to redis-py from its settings; in the address they would override the setting."""


def _split(url: str) -> SplitResult | None:
    """The parts of a URL; None where its host or port cannot be used."""
    from urllib.parse import urlsplit  # a third of a light import's time

    if not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        _ = parts.port, (parts.hostname or "").encode("idna")  # as the socket will encode it
    except ValueError:  # its text quotes the URL, password and all
        return None
    return parts


def has_password(url: str) -> bool:
    """Whether the address of a Redis server contains a password."""
    from urllib.parse import parse_qs, urlsplit

    if is_sentinel(url):
        return sentinel_address(url).password is not None
    parts = urlsplit(url)
    return parts.password is not None or "password" in parse_qs(parts.query)


def without_user(url: str) -> tuple[str, str | None]:
    """The address of a Redis server without its user name, and that name; redis-py takes it elsewhere, too."""
    from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

    parts = urlsplit(url)
    options = parse_qsl(parts.query, keep_blank_values=True)
    named = next((value for name, value in options if name == "username"), unquote(parts.username or ""))
    query = urlencode([(name, value) for name, value in options if name != "username"])
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query).geturl()
    if parts.scheme == "unix" and not bare.startswith("unix://"):
        bare = f"unix://{bare.removeprefix('unix:')}"
    return bare, named or None


def with_password(url: str, password: str) -> str:
    """The address of a Redis server with a password in it. It may have a user name."""
    from urllib.parse import quote

    if is_sentinel(url):
        scheme, _, rest = url.partition("://")
        login, _, places = rest.rpartition("@")
        return f"{scheme}://{login}:{quote(password, safe='')}@{places}"
    bare, username = without_user(url)
    scheme, _, rest = bare.partition("://")
    return f"{scheme}://{quote(username or '', safe='')}:{quote(password, safe='')}@{rest}"


def redis_fault(url: str) -> str | None:
    """What is wrong with the address of a Redis server, and how to write it; None where it can be used."""
    allowed = "redis://HOST:PORT/DB, rediss://HOST:PORT/DB, unix:///PATH?db=DB or " + SENTINEL_FORM
    scheme, separator, _ = url.partition("://")
    scheme = scheme.lower()
    if not separator:
        return f"expected {allowed}, found text without a scheme"
    if is_sentinel(url):
        try:
            sentinel_address(url)
        except ValueError as error:
            return f"expected {SENTINEL_FORM}, found {error}; {_ESCAPE}"
        return None
    if scheme not in {"redis", "rediss", "unix"}:
        return f"expected {allowed}, found the scheme {quoted(scheme)}"
    if (parts := _split(url)) is None:
        return f"expected {allowed}, found a host or port that cannot be used; {_ESCAPE}"
    if scheme == "unix":
        if parts.hostname or not parts.path.startswith("/") or parts.path == "/":
            return f"expected {allowed}, found no absolute path"
    elif parts.path.strip("/") and not re.fullmatch(r"[0-9]{1,9}", parts.path.strip("/")):
        return f"expected {allowed}, found a database that is not a number; {_ESCAPE}"
    # The text before an "@" may be the end of an unescaped password: never show it.
    options = parts.query.split("&") if parts.query else []
    if parts.fragment or "@" in parts.query or any("=" not in option for option in options):
        return f"expected {allowed}, found a bare # or ?; {_ESCAPE}"
    return _redis_option_fault(parts.query, scheme)


def _redis_option_fault(query: str, scheme: str) -> str | None:
    """Allow only known options. redis-py accepts more: some raise a TypeError at the first connection, and some change
    what the node reads."""
    from urllib.parse import parse_qsl

    known = _REDIS_OPTIONS | (_TLS_OPTIONS if scheme == "rediss" else {})
    given: set[str] = set()
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in given:
            return f"its option {quoted(name)} is given twice; leave one out"
        given.add(name)
        if name not in known:
            what = f"its option {quoted(name)} cannot be set in the address"
            if name in _TLS_OPTIONS:
                return f"{what}; only rediss://HOST:PORT/DB takes it"
            if setting := _SETTING_OF_OPTION.get(name):
                return f"{what}; leave it out, and set {setting}"
            return f"{what}; {nearest(name, known)}"
        pattern, form = known[name]
        if not re.fullmatch(pattern, value):
            return f"its option {quoted(name)} must be {form}"
    if "ssl_keyfile" in given and "ssl_certfile" not in given:
        return 'its option "ssl_keyfile" needs "ssl_certfile", the certificate of that key'
    return None


def listen_address(text: str) -> tuple[str, int] | None:
    """Host and port of HOST:PORT, with an IPv6 address in brackets; None where it cannot be used."""
    host, separator, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            return None
    elif ":" in host:
        return None
    if not separator or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        return None
    return (host, int(port)) if re.fullmatch(r"[A-Za-z0-9.:_%-]+", host) else None


def http_fault(url: str, *, whole: bool = False) -> str | None:
    """What is wrong with an HTTP address, and how to write it; None where it can be used.

    Args:
        whole: it is requested as it is, so that it may have a query; otherwise paths are appended to it.
    """
    allowed = "http://HOST:PORT or https://HOST:PORT"
    scheme, separator, _ = url.partition("://")
    if not separator:
        return f"expected {allowed}, found text without a scheme"
    if scheme.lower() not in {"http", "https"}:
        return f"expected {allowed}, found the scheme {quoted(scheme)}"
    if (parts := _split(url)) is None:
        return f"expected {allowed}, found a host or port that cannot be used; {_ESCAPE}"
    if not parts.hostname:
        return f"expected {allowed}, found no host"
    if not whole and (parts.query or parts.fragment):
        return f"expected {allowed}, found a query or a fragment (?… or #…); paths are appended to this address"
    return None
