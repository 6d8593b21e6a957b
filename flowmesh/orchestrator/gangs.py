"""Offers this node's idle slots to tasks on several nodes (gangs), and takes the memberships that come of it.

An offer holds nothing: an idle slot takes any other task meanwhile. Only in the first half of each period, by Redis'
clock and so on all nodes at once, does a slot that fits the first gang in line take nothing that is less urgent. So
slots that become free within some seconds come together, and no slot waits for a gang for longer than that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from loguru import logger

from flowmesh.bus.connection import redis
from flowmesh.bus.scripts import run_script
from flowmesh.execution.executor import Executor
from flowmesh.execution.run import Run
from flowmesh.messages.nodes import Gang, member_id
from flowmesh.messages.wire import Recorded, utc_now
from flowmesh.node.slots import Slot
from flowmesh.orchestrator.dispatcher import Dispatcher, dispatch_of
from flowmesh.orchestrator.elsewhere import read_workers
from flowmesh.orchestrator.record_sender import stop_stale
from flowmesh.orchestrator.rendezvous import free_port, own_address
from flowmesh.queue import gang_scripts
from flowmesh.queue.classes import RequirementClass, parse
from flowmesh.queue.names import Priority
from flowmesh.queue.workers import Worker, nodes_that_fit

PERIOD_MS = 10_000
KEPT_MS = 5_000
"""In the first part of each period, idle slots are kept for the first gang in line that can be complete."""
MOST = 64
"""Waiting gangs that a node looks at."""
MOST_OFFERS = 16
"""Gangs that one slot is offered to at once."""
WORKERS_S = 5.0
"""How long the list of registered workers is believed."""
RENEW_S = 1.0
"""Between two looks while gangs wait and a slot is idle."""
_RANKS = {priority.value: rank for rank, priority in enumerate(Priority)}


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A gang that waits."""

    task_id: str
    wanted: RequirementClass
    rank: int
    """Of its priority, from 0: high."""
    timeout_s: float | None
    least: int
    avoid: str
    """The node where it failed last; empty: none."""
    feasible: bool
    """Whether there are enough nodes that fit it, busy or not."""


class Gangs:
    """
    Args:
        fits: whether tasks of a class can run in a slot.
    """

    def __init__(
        self,
        executor: Executor,
        dispatcher: Dispatcher,
        client: redis.Redis,
        node_id: str,
        fits: Callable[[Slot[Run], RequirementClass], bool],
    ) -> None:
        self._executor = executor
        self._dispatcher = dispatcher
        self._client = client
        self._node_id = node_id
        self._fits = fits
        self._waiting: tuple[Waiting, ...] = ()
        self._clock_ms = 0.0
        """Redis' clock minus our monotonic one."""
        self._offered: set[str] = set()
        """Workers whose offers, or memberships, Redis may have."""
        self._workers: list[Worker] = []
        self._workers_at = float("-inf")
        self._address = executor.settings.queue.gang_address or ""
        self.trouble = ""
        """Why this node offers itself to none; empty: it does."""

    @property
    def any_wait(self) -> bool:
        return bool(self._waiting)

    @property
    def any_fits(self) -> bool:
        """Whether a slot of this node could be in a gang that waits."""
        slots = self._executor.slots.values()
        return any(self._may_have(each, slot) for each in self._waiting for slot in slots)

    def may_be_member(self, worker_id: str) -> None:
        """Redis may have a membership of this worker: the next offer takes it."""
        self._offered.add(worker_id)

    def first(self, slot: Slot[Run]) -> Waiting | None:
        """The gang that the slot is kept for now."""
        if (time.monotonic() * 1000 + self._clock_ms) % PERIOD_MS >= KEPT_MS:
            return None
        return next((each for each in self._waiting if each.feasible and self._may_have(each, slot)), None)

    def goes_first(self, slot: Slot[Run], rank: int) -> bool:
        """Whether the slot is kept from a task of a priority of this rank."""
        first = self.first(slot)
        return first is not None and rank >= first.rank

    async def read(self, count: int) -> None:
        """Read which gangs wait.

        Args:
            count: how many do.

        Raises:
            RedisError, OSError, TimeoutError: Redis is unreachable or refused a command.
        """
        if not count:
            self._waiting = ()
            return
        now_ms, rows = await run_script(self._client, gang_scripts.LIST, MOST)
        self._clock_ms = int(now_ms) - time.monotonic() * 1000
        if time.monotonic() - self._workers_at > WORKERS_S:
            self._workers, self._workers_at = await read_workers(self._client), time.monotonic()
        self._waiting = tuple(each for row in rows if (each := self._parsed(row)) is not None)

    async def withdraw(self) -> None:
        """Take back the offers of slots that are not idle any more."""
        for worker_id in sorted(self._offered):
            if not self._executor.slots[worker_id].idle or self._executor.draining is not None:
                await self._give_back(worker_id, "a member's slot is not free any more")

    async def offer(self, slots: Iterable[Slot[Run]]) -> None:
        """Offer idle slots to the gangs that they fit, or take the memberships that they have by now."""
        for slot in slots:
            worker_id = slot.plan.worker_id
            ids = self._wanted_by(slot)
            if not ids and worker_id not in self._offered:
                continue
            place = await self._place() if ids else ("", 0)
            if place is None:
                return
            arguments = self._node_id, utc_now(), *place, gang_scripts.OFFER_MS, gang_scripts.SETTLE_MS
            answer = await run_script(self._client, gang_scripts.OFFER, worker_id, *arguments, *ids)
            match answer[0]:
                case b"member":
                    await self._join(slot, answer)
                case b"offered":
                    self._offered.add(worker_id)
                case _:
                    self._offered.discard(worker_id)

    def _wanted_by(self, slot: Slot[Run]) -> list[str]:
        if (first := self.first(slot)) is not None:
            return [first.task_id]
        return [each.task_id for each in self._waiting if self._may_have(each, slot)][:MOST_OFFERS]

    def _may_have(self, each: Waiting, slot: Slot[Run]) -> bool:
        return (
            each.avoid != self._node_id
            and self._fits(slot, each.wanted)
            and not self._executor.time_left.why_not(each.timeout_s)
            and self._executor.runs.of_gang(each.task_id) is None
        )

    def _parsed(self, row: list[bytes]) -> Waiting | None:
        task_id, member, priority, timeout, least, avoid = (each.decode(errors="replace") for each in row)
        wanted = parse(member)
        if wanted is None:
            return None
        able = nodes_that_fit(self._workers, wanted) - {avoid}
        return Waiting(
            task_id=task_id,
            wanted=wanted,
            rank=_RANKS.get(priority, len(_RANKS)),
            timeout_s=float(timeout) if timeout else None,
            least=int(least),
            avoid=avoid,
            feasible=len(able) >= int(least),
        )

    async def _place(self) -> tuple[str, int] | None:
        """Where members would meet here; None: nowhere."""
        settings = self._executor.settings
        assert settings.redis.url is not None, "checked before the node starts"
        try:
            self._address = self._address or await asyncio.to_thread(own_address, settings.redis.url)
            ports = settings.queue.gang_ports
            gangs = [run.recorded.gang for run in self._executor.runs if run.recorded is not None]
            port = free_port(ports, {each.port for each in gangs if each is not None})
            trouble = "" if port is not None else f"queue.gang_ports: all of {ports} are in use"
        except OSError as error:
            port, trouble = None, f"no address for tasks on several nodes: {error}; set queue.gang_address"
        if trouble and not self.trouble:
            logger.warning("not offered to tasks on several nodes: {}", trouble)
        self.trouble = trouble
        return None if port is None else (self._address, port)

    async def _join(self, slot: Slot[Run], answer: list[Any]) -> None:
        """Take a membership: a task of this slot from now on."""
        worker_id = slot.plan.worker_id
        _, task_id, attempt, rank, size, host, port, rendezvous, priority, document = answer
        gang = Gang(
            task_id=task_id.decode(),
            rank=int(rank),
            size=int(size),
            host=host.decode(),
            port=int(port),
            rdzv_id=rendezvous.decode(),
        )
        recorded = Recorded(attempt=int(attempt), priority=priority.decode(), gang=gang)
        member = member_id(gang.task_id, gang.rank)
        if not self._dispatcher.claimed(slot, member, recorded, dispatch_of(worker_id, member, recorded, document)):
            await self._give_back(worker_id, "a member's slot is not free any more")
            return
        self._offered.discard(worker_id)
        bound = logger.bind(task=gang.task_id, rank=gang.rank, size=gang.size)
        bound.info("member of a task on several nodes; they meet at {}:{}", gang.host, gang.port)
        joined = await run_script(self._client, gang_scripts.JOIN, gang.task_id, recorded.attempt, gang.rank, worker_id)
        run = self._executor.runs.of_task(member)
        if not joined and run is not None and run.recorded == recorded:
            stop_stale(self._executor, run)

    async def _give_back(self, worker_id: str, reason: str) -> None:
        if await run_script(self._client, gang_scripts.GIVE_BACK, worker_id, utc_now(), reason):
            logger.bind(worker=worker_id).info("a task on several nodes waits again: {}", reason)
        self._offered.discard(worker_id)
