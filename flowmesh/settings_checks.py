"""What is wrong with settings whose types all fit: addresses, interpreters, names that must exist elsewhere.

Pure but for `environments.NAME.python`, whose file is looked at. No message here shows an address or a token.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flowmesh.messages.sentinel import SENTINEL_FORM, is_sentinel, sentinel_address
from flowmesh.messages.wording import nearest, quoted

if TYPE_CHECKING:
    from urllib.parse import SplitResult

    from flowmesh.settings_schema import Settings

BUILT_IN_ENVIRONMENTS = ("default", "light")
RESERVED_TOPICS = ("tasks.events", "workers.events")
"""Channels that the node itself publishes on."""

_ESCAPE = "write / : @ # ? in a user name or password as %2F %3A %40 %23 %3F"

_Options = dict[str, tuple[str, str]]
"""By name: the pattern of its values, and the words for it."""
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
"""What the node gives redis-py itself: in the address it would overrule the setting."""


class Fault(NamedTuple):
    path: tuple[str | int, ...]
    what: str


def first_fault(settings: Settings) -> Fault | None:
    """The first setting that cannot be used, or None."""
    return next(_faults(settings), None)


def _faults(settings: Settings) -> Iterator[Fault]:
    if settings.redis.url is not None and (what := _redis_fault(settings.redis.url)):
        yield Fault(("redis", "url"), what)
    if settings.redis.task_topic in RESERVED_TOPICS:
        yield Fault(
            ("redis", "task_topic"), f"{quoted(settings.redis.task_topic)} is the node's own channel for events"
        )
    if (url := settings.delivery.orchestrator_url) is not None and (what := _http_fault(url)):
        yield Fault(("delivery", "orchestrator_url"), what)
    for name, environment in settings.environments.items():
        if environment.python is not None and (what := _interpreter_fault(environment.python)):
            yield Fault(("environments", name, "python"), what)
    known = [*settings.environments, *BUILT_IN_ENVIRONMENTS]
    for name, task_type in settings.task_types.items():
        if task_type.environment is not None and task_type.environment not in known:
            what = f"there is no [environments.{task_type.environment}]; {nearest(task_type.environment, known)}"
            yield Fault(("task_types", name, "environment"), what)
    yield from _slot_faults(settings)


def _slot_faults(settings: Settings) -> Iterator[Fault]:
    """What shows without looking at the machine; `node.slots.plan` sees the rest."""
    if settings.slots and settings.node.slots != "all":
        what = f"{quoted(settings.node.slots)} and [[slots]] exclude each other; leave one out"
        yield Fault(("node", "slots"), what)
    names: dict[str, int] = {}
    gpus: dict[str, str] = {}
    cpus: dict[int, str] = {}
    for index, slot in enumerate(settings.slots):
        if slot.name.lower() in names:
            yield Fault(("slots", index, "name"), f"{quoted(slot.name)} is slots[{names[slot.name.lower()]}] already")
        names[slot.name.lower()] = index
        for at, gpu in enumerate(slot.gpus):
            if (other := gpus.setdefault(str(gpu).lower(), slot.name)) != slot.name:
                yield Fault(("slots", index, "gpus", at), f"GPU {gpu} is in slot {quoted(other)} already")
        if slot.cpus is not None:
            try:
                numbers = cpu_numbers(slot.cpus)
            except ValueError as error:
                yield Fault(("slots", index, "cpus"), str(error))
                continue
            for cpu in numbers:
                if (other := cpus.setdefault(cpu, slot.name)) != slot.name:
                    yield Fault(("slots", index, "cpus"), f"CPU {cpu} is in slot {quoted(other)} already")


def cpu_numbers(text: str) -> tuple[int, ...]:
    """The numbers of a list such as `0-7,16`, in order.

    Raises:
        ValueError: a range runs backwards, or a number stands there twice.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        run = range(int(first), int(last or first) + 1)
        if not run:
            raise ValueError(f"{quoted(part)} runs backwards")
        numbers += run
    if twice := [number for number in set(numbers) if numbers.count(number) > 1]:
        raise ValueError(f"CPU {min(twice)} stands there twice")
    return tuple(sorted(numbers))


def _split(url: str) -> SplitResult | None:
    """The parts of a URL whose host and port can be used."""
    from urllib.parse import urlsplit  # a third of a light import's time

    if not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        _ = parts.port, (parts.hostname or "").encode("idna")  # as the socket will encode it
    except ValueError:  # its text quotes the URL, password and all
        return None
    return parts


def _redis_fault(url: str) -> str | None:
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
    # What stands before an "@" may be the end of a password that was not escaped, and is not to be shown.
    if parts.fragment or "@" in parts.query or any("=" not in each for each in parts.query.split("&") if parts.query):
        return f"expected {allowed}, found a bare # or ?; {_ESCAPE}"
    return _redis_option_fault(parts.query, scheme)


def _redis_option_fault(query: str, scheme: str) -> str | None:
    """redis-py takes any option that one of its classes has, some with a TypeError at the first connection, and some
    that change what the node reads."""
    from urllib.parse import parse_qsl

    known = _REDIS_OPTIONS | (_TLS_OPTIONS if scheme == "rediss" else {})
    given: set[str] = set()
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in given:
            return f"its option {quoted(name)} stands there twice; leave one out"
        given.add(name)
        if name not in known:
            what = f"its option {quoted(name)} cannot be set there"
            if name in _TLS_OPTIONS:
                return f"{what}; only rediss://HOST:PORT/DB takes it"
            if setting := _SETTING_OF_OPTION.get(name):
                return f"{what}; leave it out, and set {setting}"
            return f"{what}; {nearest(name, known)}"
        pattern, wanted = known[name]
        if not re.fullmatch(pattern, value):
            return f"its option {quoted(name)} must be {wanted}"
    if "ssl_keyfile" in given and "ssl_certfile" not in given:
        return 'its option "ssl_keyfile" needs "ssl_certfile", the certificate of that key'
    return None


def _http_fault(url: str) -> str | None:
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
    if parts.query or parts.fragment:
        return f"expected {allowed}, found a query or a fragment (?… or #…); paths are appended to this address"
    return None


def _interpreter_fault(python: str) -> str | None:
    path = Path(python)
    wanted = "expected an absolute path of a Python interpreter"
    try:
        if not path.exists():
            return f"{wanted}, found {quoted(python)}, which does not exist"
        if not path.is_file():
            return f"{wanted}, found {quoted(python)}, which is not a file"
    except OSError as error:
        return f"{wanted}, found {quoted(python)}: {(error.strerror or 'cannot be read').lower()}"
    if not os.access(path, os.X_OK):
        return f"{wanted}, found {quoted(python)}, which may not be executed"
    return None
