"""Takes tasks from the deployment's queue for this node's idle slots.

A slot that becomes free asks Redis at once. A node with idle slots then blocks on the wake-up lists of the classes that
they fit: of all idle nodes, Redis wakes one for each entry. A poll every few seconds covers a token that was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Mapping

import msgspec
from loguru import logger

from flowmesh.backoff import Backoff
from flowmesh.bus.connection import RedisError, redis
from flowmesh.bus.connection_health import ConnectionHealth, describe_redis_error
from flowmesh.bus.exchange import exchange, leave_replica
from flowmesh.bus.scripts import is_forbidden, run_script
from flowmesh.cancellation import run_all
from flowmesh.execution.executor import Executor
from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run
from flowmesh.messages.wire import Recorded, utc_now
from flowmesh.node.slots import Slot
from flowmesh.orchestrator.dispatcher import Dispatcher, dispatch_of
from flowmesh.orchestrator.elsewhere import fits_elsewhere
from flowmesh.orchestrator.gangs import RENEW_S, Gangs
from flowmesh.orchestrator.record_sender import RecordSender, stop_stale
from flowmesh.orchestrator.registration import Registration
from flowmesh.orchestrator.wake_ups import POLL_S, WakeUps
from flowmesh.queue import names, scripts
from flowmesh.queue.classes import RequirementClass, parse
from flowmesh.queue.names import Priority
from flowmesh.tasks.journal import JournalError

MOST_CLASSES = 500
"""Classes that one claim asks for, and that one read waits for."""
_RANKS = {priority.value: rank for rank, priority in enumerate(Priority)}
_ERRORS = (RedisError, OSError, TimeoutError, JournalError)
FORBIDDEN_S = 300.0
"""Between two tries of a login that may not use the queue."""
ALLOW_S = 2.0
"""Between two checks whether tasks that failed here still fit another node."""
SOON_S = 1.0
"""About when to look again after an entry that another node should take, or before the worker is registered."""
COMPARE_S = 5.0
"""At least between two checks whether what runs here was begun elsewhere, too."""


class Claims(Observer):
    """
    Args:
        client: for commands.
        blocked: another one, used by nothing else: its reads block for up to POLL_S.
    """

    def __init__(
        self,
        executor: Executor,
        dispatcher: Dispatcher,
        registration: Registration,
        sender: RecordSender,
        *,
        client: redis.Redis,
        blocked: redis.Redis,
        node_id: str,
    ) -> None:
        self.trouble = ConnectionHealth("the queue is not read", "the queue is read again")
        self.claimed = 0
        self.refused = ""
        """Why this login may not use the queue; empty: it may."""
        self._executor = executor
        self._dispatcher = dispatcher
        self._registration = registration
        self._sender = sender
        self._client = client
        self._wake_ups = WakeUps(blocked)
        self._node_id = node_id
        self.gangs = Gangs(executor, dispatcher, client, node_id, self.fits)
        self._lock = asyncio.Lock()
        self._doubt = True
        """Whether Redis may have claims of ours that we do not know of."""
        self._compared_at = float("-inf")
        self._free = asyncio.Event()
        self._renewed = asyncio.Event()
        """The classes in use changed: what is waited for must be chosen again."""
        self._looked = asyncio.Event()
        """A look has ended: perhaps a slot is idle now."""
        self._classes: dict[str, RequirementClass] = {}
        self._allowed_at = float("-inf")
        self._turn = random.randrange(1 << 16)

    def on_slot_free(self, slot: Slot[Run], last: Run) -> None:  # noqa: ARG002 - the observer's signature
        self._free.set()

    def on_slot_changed(self, slot: Slot[Run]) -> None:  # noqa: ARG002
        self._free.set()

    def on_fault_changed(self) -> None:
        self._free.set()

    def look_again(self) -> None:
        """Look at once: a class was added, or a message may have been missed."""
        self._free.set()

    async def run(self) -> None:
        """Claim until cancelled."""
        backoff = Backoff()
        await self._registration.subscribed.wait()
        await run_all(self._look_again_and_again(backoff), self._wait_for_tokens())

    async def _look_again_and_again(self, backoff: Backoff) -> None:
        while True:
            self._free.clear()
            try:
                await self.look()
            except _ERRORS as error:
                pause_s = self._failed(error, backoff)
                await leave_replica(self._client, error)
                await asyncio.sleep(pause_s)
                continue
            self._looked.set()
            self.trouble.works()
            self.refused = ""
            backoff.reset()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S if self.gangs.any_wait else random.uniform(*POLL_S)):
                    await self._free.wait()

    def _failed(self, error: BaseException, backoff: Backoff) -> float:
        """Note a failure; returns how long to wait."""
        self._doubt = True
        if not is_forbidden(error):
            self.trouble.failed(error)
            return backoff.next_s()
        if not self.refused:
            self.refused = describe_redis_error(error)
            logger.warning(
                "no tasks are taken from the queue: {}; allow this login ~flowmesh:*, &flowmesh.queue, +@scripting and "
                "+time, or set queue.enabled to false",
                self.refused,
            )
        return FORBIDDEN_S

    async def look(self, woken: str = "") -> bool:
        """Claim for each idle slot what it fits.

        Args:
            woken: the class whose token was taken.

        Returns:
            whether an entry was left for another node, or this worker may take none now.
        """
        async with self._lock:
            if self._doubt:
                await self._compare()
                self._doubt = False
            elif time.monotonic() - self._compared_at >= COMPARE_S:
                await self._stop_stale()
            left = used = False
            await self.gangs.withdraw()
            idle = self.idle_slots()
            waiting = await self._read_classes() if idle else {}
            if woken:
                waiting.setdefault(woken, len(_RANKS))
            for slot in idle:
                open_to = {key: rank for key, rank in waiting.items() if not self.gangs.goes_first(slot, rank)}
                if slot.idle and (keys := self._fitting(slot, open_to)):
                    used = used or woken in keys
                    left |= await self._claim(slot, keys, woken if woken in keys else "")
            await self.gangs.offer(slot for slot in idle if slot.idle)
            if woken and not used:
                await run_script(self._client, scripts.WAKE, woken)
            return left

    def idle_slots(self) -> list[Slot[Run]]:
        """Those that may take a task now."""
        if self._executor.draining is not None:
            return []
        presences = self._registration.presences
        return [
            slot
            for worker_id, slot in self._executor.slots.items()
            if slot.idle and not slot.trouble and presences[worker_id].status.word == "IDLE"
        ]

    def fits(self, slot: Slot[Run], wanted: RequirementClass) -> bool:
        """Whether tasks of a class can run in a slot."""
        identity = self._registration.presences[slot.plan.worker_id].identity
        hardware = msgspec.to_builtins(identity.hardware)
        return not wanted.why_not(hardware, self._executor.offered_types(), identity.tags)

    def _fitting(self, slot: Slot[Run], among: Mapping[str, int]) -> list[str]:
        """The keys of the classes that a slot fits, MOST_CLASSES at most.

        Args:
            among: of these; with the rank of the most urgent entry that waits. Those of one rank come in turn.
        """
        keys = [key for key in among if key in self._classes and self.fits(slot, self._classes[key])]
        self._turn += 1
        at = self._turn % len(keys) if keys else 0
        return sorted(keys[at:] + keys[:at], key=among.__getitem__)[:MOST_CLASSES]

    async def _claim(self, slot: Slot[Run], keys: list[str], woken: str) -> bool:
        """Take a task; returns whether one may be there that is not for this worker now."""
        worker_id = slot.plan.worker_id
        arguments = worker_id, self._node_id, utc_now(), woken, *self._executor.time_left.limits(), *keys
        answer = await run_script(self._client, scripts.CLAIM, *arguments)
        what = answer[0].decode()
        if what != "task":
            if what == "member":
                self.gangs.may_be_member(worker_id)
                return False
            left = what == "none" and bool(answer[1] or answer[2])
            if left and answer[1]:
                await self._allow(answer[1])
            if left or what == "unregistered":
                asyncio.get_running_loop().call_later(random.uniform(0.5, 1.5) * SOON_S, self._free.set)
            return left or what != "none"
        task_id, attempt, priority = answer[1].decode(), int(answer[2]), answer[3].decode()
        recorded = Recorded(attempt=attempt, priority=priority)
        message = dispatch_of(worker_id, task_id, recorded, answer[4])
        if not self._dispatcher.claimed(slot, task_id, recorded, message):
            logger.bind(task=task_id).info("claim given back: the slot is not free any more")
            await run_script(self._client, scripts.RELEASE, task_id, attempt, worker_id, utc_now(), "")
            return False
        self.claimed += 1
        await run_script(self._client, scripts.JOURNALLED, task_id, attempt)
        return False

    async def peek(self, slot: Slot[Run], known: str) -> tuple[str, bytes] | None:
        """The task that the slot would get if it were free, about; nothing is taken.

        Args:
            known: a task whose document is not needed.

        Returns:
            its id and its document (empty for the known one); None: there is none.
        """
        async with self._lock:
            waiting = await self._read_classes()
            keys = self._fitting(slot, waiting)
        if not keys:
            return None
        answer = await run_script(self._client, scripts.PEEK, self._node_id, known, *keys)
        return (answer[0].decode(), answer[1] or b"") if answer else None

    async def _allow(self, task_ids: list[bytes]) -> None:
        """Tasks that failed here were left to other nodes: take back what fits none of them any more."""
        if time.monotonic() - self._allowed_at < ALLOW_S:
            return
        self._allowed_at = time.monotonic()
        for raw_id in task_ids:
            if not await fits_elsewhere(self._client, raw_id.decode(), self._executor.slots):
                await run_script(self._client, scripts.ALLOW, raw_id, self._node_id)

    async def _compare(self) -> None:
        """Bring this node and Redis into agreement after a restart or an outage.

        What Redis says that we hold, and we do not, goes back: an answer was lost, or the node died before it wrote it
        down. What we run, and another attempt was begun of, is stopped.
        """
        async with self._client.pipeline(transaction=False) as pipeline:
            for worker_id in self._executor.slots:
                pipeline.hgetall(names.held_key(worker_id))
            answers = await pipeline.execute()
        pending = self._sender.pending()
        for worker_id, held in zip(self._executor.slots, answers, strict=True):
            for raw_id, raw_attempt in held.items():
                task_id, attempt = raw_id.decode(), int(raw_attempt)
                if not _is_attempt(self._executor.runs.of_task(task_id), attempt) and (task_id, attempt) not in pending:
                    logger.bind(task=task_id, attempt=attempt).warning("claim given back: this node does not have it")
                    await run_script(self._client, scripts.RELEASE, task_id, attempt, worker_id, utc_now(), "")
        await self._stop_stale()

    async def _stop_stale(self) -> None:
        """Stop what runs here and another attempt was begun of.

        Connections may outlive a cut of the network, so a node need not notice that its tasks were taken over.
        """
        self._compared_at = time.monotonic()
        runs = [run for run in self._executor.runs if run.recorded is not None and run.recorded.priority]
        if not runs:
            return
        async with self._client.pipeline(transaction=False) as pipeline:
            for run in runs:
                pipeline.hmget(names.record_key(run.task_id), "attempt", "state")
            answers = await pipeline.execute()
        for run, (attempt, state) in zip(runs, answers, strict=True):
            if attempt is not None and (not _is_attempt(run, int(attempt)) or state in (b"queued", b"done")):
                stop_stale(self._executor, run)

    async def _read_classes(self) -> dict[str, int]:
        """Read the classes in use; returns those with entries, and the rank of the most urgent one (0: high)."""
        classes = ("ZREVRANGE", names.CLASSES, "0", "-1")
        rest = ("HKEYS", names.WAITING), ("ZCARD", names.GANGS)
        members, fields, gangs = await exchange(self._client, classes, *rest)
        await self.gangs.read(gangs)
        found = {}
        for member in members:
            wanted = parse(member.decode(errors="replace"))
            if wanted is not None:
                found[wanted.key] = wanted
        if found.keys() != self._classes.keys():
            self._classes = found
            self._renewed.set()
        ranks: dict[str, int] = {}
        for field in fields:
            key, _, priority = field.decode(errors="replace").partition(":")
            ranks[key] = min(_RANKS.get(priority, len(_RANKS)), ranks.get(key, len(_RANKS)))
        return ranks

    async def _wait_for_tokens(self) -> None:
        """Block on the wake-up lists while a slot is idle; a token leads to a look."""
        backoff = Backoff()
        while True:
            self._renewed.clear()
            every = dict.fromkeys(self._classes, 0)
            open_slots = [slot for slot in self.idle_slots() if self.gangs.first(slot) is None]
            keys = sorted({key for slot in open_slots for key in self._fitting(slot, every)})
            if not keys or self.trouble or self.refused:
                self._looked.clear()
                await self._looked.wait()
                continue
            try:
                if (woken := await self._wake_ups.token(keys, self._renewed)) is not None:
                    left = await self.look(woken)
                    backoff.reset()
                    if left:
                        await asyncio.sleep(SOON_S)
            except _ERRORS as error:
                pause_s = self._failed(error, backoff)
                await leave_replica(self._wake_ups.client, error)
                await asyncio.sleep(pause_s)


def _is_attempt(run: Run | None, attempt: int) -> bool:
    return run is not None and run.recorded is not None and run.recorded.attempt == attempt
