"""Cross-field validation of settings, after all types fit: addresses, interpreters, names that must exist elsewhere.

Pure except for `environments.NAME.python`, whose file must exist. No message shows an address or a token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flowmesh.settings.addresses import has_password, http_fault, listen_address, redis_fault
from flowmesh.settings.moments import moment
from flowmesh.settings.schema import Settings
from flowmesh.validation.describe import nearest, quoted
from flowmesh.web.origins import is_loopback

BUILT_IN_ENVIRONMENTS = ("default", "light")
RESERVED_TOPICS = ("tasks.events", "workers.events")
"""Channels that the node publishes on."""


class Fault(NamedTuple):
    path: tuple[str | int, ...]
    what: str


def first_fault(settings: Settings) -> Fault | None:
    """The first setting that cannot be used, or None."""
    return next(all_faults(settings), None)


def all_faults(settings: Settings) -> Iterator[Fault]:
    """The settings that cannot be used."""
    if settings.redis.url is not None and (what := redis_fault(settings.redis.url)):
        yield Fault(("redis", "url"), what)
    if settings.node.ends_at is not None:
        try:
            moment(settings.node.ends_at)
        except ValueError as error:
            yield Fault(("node", "ends_at"), str(error))
    if settings.redis.task_topic in RESERVED_TOPICS:
        yield Fault(
            ("redis", "task_topic"), f"{quoted(settings.redis.task_topic)} is reserved for events; choose another name"
        )
    if (url := settings.delivery.orchestrator_url) is not None and (what := http_fault(url)):
        yield Fault(("delivery", "orchestrator_url"), what)
    cloud = settings.cloud
    if (cloud.read or cloud.write) and cloud.endpoint_url is not None and (what := http_fault(cloud.endpoint_url)):
        yield Fault(("cloud", "endpoint_url"), what)
    if settings.delivery.orchestrator_token is not None and settings.delivery.orchestrator_token_file is not None:
        what = "delivery.orchestrator_token is set, too; leave one of the two out"
        yield Fault(("delivery", "orchestrator_token_file"), what)
    if settings.otel.endpoint is not None and (what := http_fault(settings.otel.endpoint)):
        yield Fault(("otel", "endpoint"), what)
    if (listen := settings.web.listen) is not None:
        if (place := listen_address(listen)) is None:
            yield Fault(
                ("web", "listen"), f"expected HOST:PORT, as 127.0.0.1:9470 or [::1]:9470, found {quoted(listen)}"
            )
        elif not is_loopback(place[0]) and settings.web.token_file is None:
            what = f"{quoted(place[0])} is not a loopback address: set web.token_file, or listen on 127.0.0.1"
            yield Fault(("web", "listen"), what)
    if (ports := settings.queue.gang_ports) is not None and (what := _ports_fault(ports)):
        yield Fault(("queue", "gang_ports"), what)
    for index, url in enumerate(settings.notify.url):
        if what := http_fault(url, whole=True):
            yield Fault(("notify", "url", index), what)
        elif url in settings.notify.url[:index]:
            yield Fault(("notify", "url", index), "the same address comes before; leave one out")
    if settings.redis.password_file is not None and has_password(settings.redis.url or ""):
        yield Fault(("redis", "password_file"), "redis.url contains a password, too; leave one of the two out")
    for name, environment in settings.environments.items():
        if environment.python is not None and (what := _interpreter_fault(environment.python)):
            yield Fault(("environments", name, "python"), what)
    known = [*settings.environments, *BUILT_IN_ENVIRONMENTS]
    for name, task_type in settings.task_types.items():
        if task_type.environment is not None and task_type.environment not in known:
            what = f"there is no [environments.{task_type.environment}]; {nearest(task_type.environment, known)}"
            yield Fault(("task_types", name, "environment"), what)
    for index, root in enumerate(settings.tasks.read_roots):
        if Path(root).parts[1:2] in (("proc",), ("sys",)):
            what = f"{quoted(root)} holds no data but the state of processes and devices; leave it out"
            yield Fault(("tasks", "read_roots", index), what)
    yield from _slot_faults(settings)


def _slot_faults(settings: Settings) -> Iterator[Fault]:
    """What can be checked without the machine; `node.slots.plan` checks the rest."""
    if settings.slots and settings.node.slots != "all":
        what = f"{quoted(settings.node.slots)} and [[slots]] exclude each other; leave one out"
        yield Fault(("node", "slots"), what)
    names: dict[str, int] = {}
    gpus: dict[str, str] = {}
    cpus: dict[int, str] = {}
    for index, slot in enumerate(settings.slots):
        if slot.name.lower() in names:
            what = f"{quoted(slot.name)} is already the name of slots[{names[slot.name.lower()]}]; choose another one"
            yield Fault(("slots", index, "name"), what)
        names[slot.name.lower()] = index
        for at, gpu in enumerate(slot.gpus):
            if (other := gpus.setdefault(str(gpu).lower(), slot.name)) != slot.name:
                what = f"GPU {gpu} is already in slot {quoted(other)}; name it in one of them"
                yield Fault(("slots", index, "gpus", at), what)
        if slot.cpus is not None:
            try:
                numbers = cpu_numbers(slot.cpus)
            except ValueError as error:
                yield Fault(("slots", index, "cpus"), str(error))
                continue
            for cpu in numbers:
                if (other := cpus.setdefault(cpu, slot.name)) != slot.name:
                    what = f"CPU {cpu} is already in slot {quoted(other)}; name it in one of them"
                    yield Fault(("slots", index, "cpus"), what)


def cpu_numbers(text: str) -> tuple[int, ...]:
    """The numbers of a list such as `0-7,16`, sorted.

    Raises:
        ValueError: a range runs backwards, or a number is listed twice.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        run = range(int(first), int(last or first) + 1)
        if not run:
            raise ValueError(f"{quoted(part)} runs backwards; write the smaller number first")
        numbers += run
    if twice := [number for number in set(numbers) if numbers.count(number) > 1]:
        raise ValueError(f"CPU {min(twice)} is listed twice; leave one out")
    return tuple(sorted(numbers))


def _interpreter_fault(python: str) -> str | None:
    path = Path(python)
    allowed = "expected an absolute path of a Python interpreter"
    try:
        if not path.exists():
            return f"{allowed}, found {quoted(python)}, which does not exist"
        if not path.is_file():
            return f"{allowed}, found {quoted(python)}, which is not a file"
    except OSError as error:
        return f"{allowed}, found {quoted(python)}: {(error.strerror or 'cannot be read').lower()}"
    if not os.access(path, os.X_OK):
        return f"{allowed}, found {quoted(python)}, which is not executable for this user"
    return None


def _ports_fault(ports: str) -> str:
    first, last = map(int, ports.split("-"))
    return "" if first <= last <= 65535 else f"expected FIRST-LAST of 1 to 65535, the lower one first, found {ports!r}"
