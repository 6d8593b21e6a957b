"""Imports the libraries of environments before a task needs them, in moments in which no task runs.

A fork server's imports take seconds to half a minute, which the first task of an environment would wait for. They are
made one at a time, with less priority than a task has, and within a bound of memory. An environment whose imports fail
is a fault of the node, found before a task meets it. After them the node imports what it checks documents of the
environment's task types with.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence, Set

import msgspec
import psutil
from loguru import logger

from flowmesh.node import hardware
from flowmesh.processes import linux
from flowmesh.processes.server_pool import ServerPool
from flowmesh.settings.schema import EnvironmentSettings
from flowmesh.tasks.catalogue import LIGHT, Catalogue, TaskType
from flowmesh.tasks.checks import rehearse
from flowmesh.tasks.journal import Journal, JournalError

LOOK_S = 0.5
QUIET_S = 1.0
"""How long no task must have run before an import begins."""
KEEP_S = 600.0
"""How long a server that nobody uses is kept where it need not stay."""
NICE = 10
GUESS_BYTES = 1 << 30
"""Memory of a server that never ran on this node."""
SPARE = 0.1
"""Part of the node's memory that has to stay available."""
_FACT = "environments"


class Seen(msgspec.Struct):
    """What is remembered of environments over restarts."""

    order: list[str] = []
    """By last use, the latest first."""
    rss_bytes: dict[str, int] = {}
    """Memory of their servers."""


class Warming:
    """
    Args:
        settings: of environments, by name; one that is missing has the defaults.
        broken: the environments that do not work now.
        report: (environment, reason) that an environment does not work.
        max_mb: memory of the servers together; None: a quarter of the node's memory; 0: none is started.
        idle: whether no task runs or waits.
        wanted: whether tasks may come; where they may not, servers are let go after a while.
    """

    def __init__(
        self,
        *,
        pool: ServerPool,
        catalogue: Catalogue,
        broken: Callable[[], Set[str]],
        report: Callable[[str, str], None],
        journal: Journal,
        settings: Mapping[str, EnvironmentSettings],
        max_mb: int | None,
        idle: Callable[[], bool],
        wanted: Callable[[], bool],
    ) -> None:
        self._pool = pool
        self._catalogue = catalogue
        self._broken = broken
        self._report = report
        self._journal = journal
        self._settings = settings
        self._total_bytes = hardware.memory_total_bytes()
        self._max_bytes = self._total_bytes // 4 if max_mb is None else max_mb << 20
        self._idle = idle
        self._wanted = wanted
        self._wanted_at = self._busy_at = time.monotonic()
        self._nice = NICE if linux.may_raise_priority() else 0
        self._told: set[str] = set()
        self._begun: list[asyncio.Task[None]] = []
        self._seen = Seen()
        with contextlib.suppress(msgspec.DecodeError):
            self._seen = msgspec.json.decode(journal.find_fact(_FACT) or "{}", type=Seen)

    def begin(self) -> None:
        """Start the servers of environments that are imported beside the node's start, without waiting for them."""
        for name in self._names():
            if self._of(name).warm == "at start":
                self._begun.append(asyncio.create_task(self._warm(name)))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            if not self._idle():
                self._busy_at = now
            if self._wanted():
                self._wanted_at = now
            self._remember()
            if now - self._wanted_at > KEEP_S:
                self._let_go(self._names(), now, "no task may come")
                continue
            self._let_go([name for name in self._names() if self._of(name).warm is False], now, "no task used it")
            if now - self._busy_at >= QUIET_S and self._wanted_at == now:
                await self._warm_next()

    async def _warm_next(self) -> None:
        """Start one server, and wait for it."""
        ahead = (name for name in self._names() if self._of(name).warm in (True, "at start"))
        name = next((name for name in ahead if self._may(name)), None)
        if name is not None:
            await self._warm(name)

    async def _warm(self, name: str) -> None:
        """Start a server, and wait for it; then rehearse the checks of its types."""
        if problem := await self._pool.warm(name, nice=self._nice):
            self._report(name, problem)
            return
        if self._of(name).python is None:  # documents of the others are checked by their tasks
            for kind in self._catalogue.offered.values():
                if kind.environment == name:
                    await asyncio.to_thread(_rehearse, kind)

    def _names(self) -> list[str]:
        """The environments of the offered types, the one that was used last first."""
        names = sorted({each.environment for each in self._catalogue.offered.values()} - {LIGHT})
        order = self._seen.order
        return sorted(names, key=lambda name: order.index(name) if name in order else len(order))

    def _of(self, name: str) -> EnvironmentSettings:
        return self._settings.get(name) or EnvironmentSettings()

    def _may(self, name: str) -> bool:
        if self._pool.has_server(name) or name in self._broken():
            return False
        needs = self._seen.rss_bytes.get(name, GUESS_BYTES)
        used = sum(self._pool.rss_bytes(each) for each in self._names())
        available = psutil.virtual_memory().available
        if used + needs <= self._max_bytes and needs + SPARE * self._total_bytes <= available:
            return True
        if self._max_bytes and name not in self._told:
            self._told.add(name)
            logger.bind(environment=name, needs_mb=needs >> 20, available_mb=available >> 20).info(
                "not imported ahead of its first task: it does not fit into processes.warm_max_mb = {}, or into the "
                "memory that is free",
                self._max_bytes >> 20,
            )
        return False

    def _let_go(self, names: Sequence[str], now: float, why: str) -> None:
        for name in names:
            if now - self._pool.used_at.get(name, self._wanted_at) > KEEP_S and self._pool.let_go(name):
                logger.bind(environment=name).info("fork server let go: {} for {:.0f} s", why, KEEP_S)

    def _remember(self) -> None:
        used = self._pool.used_at
        order = sorted(set(used) & set(self._names()), key=lambda name: -used[name])
        order += [name for name in self._seen.order if name not in order]
        rss = self._seen.rss_bytes | {name: size for name in self._names() if (size := self._pool.rss_bytes(name))}
        if (now := Seen(order, rss)) != self._seen:
            with contextlib.suppress(JournalError):  # said by the journal's own condition
                self._journal.set_fact(_FACT, msgspec.json.encode(now).decode())
                self._seen = now


def _rehearse(kind: TaskType) -> None:
    try:
        rehearse(kind)
    except Exception as error:  # noqa: BLE001 - it meets the first document, too, which is then checked by its task
        logger.debug("the check of the task type {} failed ahead of its first document: {}", kind.name, error)
