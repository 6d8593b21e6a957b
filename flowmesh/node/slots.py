"""A slot: the devices that one task at a time may have, and the tasks that wait for them, in the order they came."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import msgspec

RunT = TypeVar("RunT")


class SlotPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a slot is made of. Each slot is a worker of its own to the orchestrator."""

    name: str
    worker_id: str
    gpus: tuple[str, ...] = ()
    """UUIDs."""
    cpus: tuple[int, ...] = ()
    """CPU numbers that its tasks may run on."""

    @property
    def threads(self) -> int:
        return max(1, len(self.cpus))

    def gpus_for(self, count: int | None) -> tuple[str, ...]:
        """The GPUs that a task which asked for `count` sees: never more than there are; all where it asked for none."""
        return self.gpus if count is None else self.gpus[:count]


class Slot(Generic[RunT]):
    """The queue of one slot. Nothing here waits or acts; the executor does."""

    def __init__(self, plan: SlotPlan) -> None:
        self.plan = plan
        self.current: RunT | None = None
        self.queue: deque[RunT] = deque()
        self.closed = ""
        """Why the slot takes no task now; empty where it does."""

    @property
    def idle(self) -> bool:
        return self.current is None and not self.queue

    def next(self) -> RunT | None:
        """Take the next task, where the slot is free and somebody waits."""
        if self.current is not None or self.closed or not self.queue:
            return None
        self.current = self.queue.popleft()
        return self.current

    def free(self, run: RunT) -> None:
        assert self.current is run, "only the task that has the slot gives it back"
        self.current = None
