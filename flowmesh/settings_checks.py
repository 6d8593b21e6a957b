"""What is wrong with settings whose types all fit: addresses, interpreters, names that must exist elsewhere.

Pure but for `environments.NAME.python`, whose file is looked at. No message here shows an address or a token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flowmesh.messages.sentinel import SENTINEL_FORM, is_sentinel, sentinel_address
from flowmesh.messages.wording import nearest, quoted

if TYPE_CHECKING:
    from urllib.parse import SplitResult

    from flowmesh.config import Settings

BUILT_IN_ENVIRONMENTS = ("default", "light")
RESERVED_TOPICS = ("tasks.events", "workers.events")
"""Channels that the node itself publishes on."""

_ESCAPE = "write / : @ # ? in a user name or password as %2F %3A %40 %23 %3F"


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
        _ = parts.port, parts.hostname
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
    elif not (parts.path.strip("/").isascii() and (parts.path in {"", "/"} or parts.path.strip("/").isdigit())):
        return f"expected {allowed}, found a database that is not a number; {_ESCAPE}"
    if parts.fragment or any("=" not in option for option in parts.query.split("&") if parts.query):
        return f"expected {allowed}, found a bare # or ?; {_ESCAPE}"
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
