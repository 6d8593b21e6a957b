"""Lasting faults of the node: which hold, which tasks must wait for each, and the probes that end them.

A fault of the node is not a task's. While one holds, the slots that it concerns start none of the tasks that it
concerns, their workers are DEGRADED with the reason, and a task that has met it waits in the queue. Each fault has a
probe, which is repeated with growing pauses until it passes. A task that has waited for longer than the fault's bound
goes back to the orchestrator as `node_fault`, for another worker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from loguru import logger

from flowmesh.backoff import Backoff
from flowmesh.execution.observer import Observer
from flowmesh.execution.ports import Begin, PostEvent, Pump
from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot, SlotFault
from flowmesh.tasks import machine
from flowmesh.tasks.verdicts import Stop

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
"""Between two probes, where the fault names no other: a probe of a folder or of the journal costs next to nothing."""
LOOK_S = 0.5
"""How often it is checked whether a task has waited too long."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of fault: its probe, and what it concerns."""

    name: str
    """Unique on the node, such as `results.dir` or `environment default`."""
    probe: Callable[[], Awaitable[str]]
    """Looks again: empty if the fault is over, else what is still wrong."""
    wait_s: float
    """How long a task waits for it."""
    worker_ids: tuple[str, ...] | None = None
    """The slots that it concerns; None: all."""
    concerns: Callable[[Run], bool] | None = None
    """The tasks that must wait; None: all."""
    partial: bool = False
    """Whether other types still run, so that the worker is DEGRADED only while a task waits for it."""
    holds_journal: bool = False
    """Whether nothing can be written down while it holds, so no task can go back either."""
    first_s: float = FIRST_PAUSE_S
    longest_s: float = LONGEST_PAUSE_S


class Condition:
    """A fault that holds now, or held not long ago."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.reason = ""
        """Empty: it does not hold now."""
        self.since = 0.0
        self.ended = 0.0
        """Both monotonic."""
        self.backoff = Backoff(fault.first_s, fault.longest_s)


class Conditions:
    """Used on the loop only.

    Args:
        on_over: called with the name of a fault that has ended, before tasks are started again.
    """

    def __init__(
        self,
        *,
        slots: Mapping[str, Slot[Run]],
        observer: Observer,
        post: PostEvent,
        pump: Pump,
        begin: Begin,
        on_over: Callable[[str], None],
    ) -> None:
        self._slots = slots
        self._observer = observer
        self._post = post
        self._pump = pump
        self._begin = begin
        self._on_over = on_over
        self._known: dict[str, Condition] = {}

    def holds(self, name: str) -> bool:
        condition = self._known.get(name)
        return condition is not None and bool(condition.reason)

    def listed(self) -> list[dict[str, Any]]:
        """Those that hold, for `flowmesh status`: name, reason, since_s, workers."""
        return [
            {
                "name": each.fault.name,
                "reason": each.reason,
                "since_s": round(time.monotonic() - each.since, 1),
                "workers": list(self._slots if each.fault.worker_ids is None else each.fault.worker_ids),
            }
            for each in self._known.values()
            if each.reason
        ]

    def report(self, fault: Fault, reason: str) -> None:
        """The fault holds, for this reason. Its slots are closed at once; a probe opens them again."""
        condition = self._known.get(fault.name)
        if condition is None or condition.fault is not fault:
            condition = self._known[fault.name] = Condition(fault)
        if condition.reason == reason:
            return
        bound = logger.bind(fault=fault.name, **self._workers(fault))
        began = not condition.reason
        condition.reason = reason
        self._mark(condition)
        if not began:
            bound.info("still: {}", reason)
            return
        condition.since = time.monotonic()
        if condition.since - condition.ended > 2 * fault.longest_s:
            condition.backoff.reset()  # else a probe passed and a task then failed: the pauses go on growing
        bound.error("degraded, tasks wait: {}" if self._slots_of(fault) else "not as it should be: {}", reason)
        self._tell(condition)
        self._begin(self._probe(condition))

    def met(self, run: Run, fault: Fault, reason: str) -> machine.Event:
        """A task that was being launched has met this fault.

        Returns:
            its next event: back to the queue, unless it has met faults for longer than it may wait.
        """
        self.report(fault, reason)
        now = time.monotonic()
        run.faulted_at = run.faulted_at or now
        if now - run.faulted_at > fault.wait_s and not fault.holds_journal:
            return machine.LaunchFailed(f"not started: {reason}")
        return machine.NeverForked()

    def over(self, name: str) -> None:
        """The fault has ended. Does nothing where it does not hold."""
        condition = self._known.get(name)
        if condition is None or not condition.reason:
            return
        condition.reason, condition.ended = "", time.monotonic()
        for slot in self._slots_of(condition.fault):
            slot.faults.pop(name, None)
        seconds = round(condition.ended - condition.since, 1)
        logger.bind(fault=name, seconds=seconds, **self._workers(condition.fault)).info("works again: {}", name)
        self._on_over(name)
        self._tell(condition)
        for slot in self._slots_of(condition.fault):
            self._pump(slot)

    async def _probe(self, condition: Condition) -> None:
        fault = condition.fault
        while condition.reason:
            due = time.monotonic() + condition.backoff.next_s()
            while (left_s := due - time.monotonic()) > 0 and condition.reason:
                await asyncio.sleep(min(left_s, LOOK_S))
                self._hand_back(condition)
            if not condition.reason:
                return
            try:
                reason = await fault.probe()
            except Exception as error:  # noqa: BLE001 - without its probe a slot would stay closed for ever
                logger.opt(exception=error).error("unhandled error in the probe of {}", fault.name)
                reason = f"its probe failed: {type(error).__name__}: {error}"
            if not condition.reason:
                return
            if not reason:
                self.over(fault.name)
                return
            self.report(fault, reason)

    def _hand_back(self, condition: Condition) -> None:
        fault, now = condition.fault, time.monotonic()
        if any(each.reason and each.fault.holds_journal for each in self._known.values()):
            return
        for slot in self._slots_of(fault):
            for run in [run for run in slot.queue if fault.concerns is None or fault.concerns(run)]:
                waits_since = run.faulted_at or max(condition.since, run.queued_at)
                if now - waits_since > fault.wait_s:
                    self._post(run, machine.StopRequested(Stop.NODE_FAULT, f"not started: {condition.reason}"))

    def _mark(self, condition: Condition) -> None:
        fault = condition.fault
        mark = SlotFault(reason=condition.reason, concerns=fault.concerns, partial=fault.partial)
        for slot in self._slots_of(fault):
            slot.faults[fault.name] = mark

    def _tell(self, condition: Condition) -> None:
        self._observer.on_fault_changed()
        for slot in self._slots_of(condition.fault):
            self._observer.on_slot_changed(slot)

    def _slots_of(self, fault: Fault) -> list[Slot[Run]]:
        ids = self._slots if fault.worker_ids is None else fault.worker_ids
        return [self._slots[worker_id] for worker_id in ids if worker_id in self._slots]

    @staticmethod
    def _workers(fault: Fault) -> dict[str, str]:
        return {} if fault.worker_ids is None else {"worker": ",".join(fault.worker_ids)}
