"""A slot: the devices that one task at a time may have, and the tasks that wait for them, in the order they came.

`plan` cuts a node into slots as its settings say; each slot is a worker of its own to the orchestrator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import msgspec

from flowmesh.errors import ConfigError, DeviceError
from flowmesh.node.devices import GpuInfo, NoSuchGpuError, find_gpu
from flowmesh.settings_checks import cpu_numbers
from flowmesh.settings_schema import Settings
from flowmesh.settings_types import SlotsMode

RunT = TypeVar("RunT")

ONLY = "main"
"""The name of a node's one slot, where nobody named it."""


class SlotPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a slot is made of."""

    name: str
    worker_id: str
    gpus: tuple[str, ...] = ()
    """UUIDs."""
    cpus: tuple[int, ...] = ()
    """CPU numbers that its tasks may run on."""
    cores: int = 0
    """How many of them it counts as its own, where it shares them with other slots; 0: all."""
    share: float = 1.0
    """Its part of what the node costs."""

    @property
    def threads(self) -> int:
        return self.cores or max(1, len(self.cpus))

    def gpus_for(self, count: int | None) -> tuple[str, ...]:
        """The GPUs that a task which asked for `count` sees: never more than there are; all where it asked for none."""
        return self.gpus if count is None else self.gpus[:count]


def plan(
    settings: Settings,
    worker_id: str,
    gpus: Sequence[GpuInfo],
    cpus: Sequence[int],
    cores: int,
    *,
    some_are_down: bool = False,
) -> tuple[SlotPlan, ...]:
    """The node's slots.

    Args:
        worker_id: the node's own; a slot's is made from it where there is more than one.
        gpus: what the node may offer.
        cpus: the numbers that the node may use.
        cores: how many of them it can keep busy at once (a cgroup's quota may be less).
        some_are_down: a slot goes without a GPU of its own that is not there; one without any is left out.

    Raises:
        ConfigError: names the key of a slot that cannot be as the settings want it.
        DeviceError: all slots are left out.
    """
    if settings.slots:
        slots = _listed(settings, gpus, cpus, cores, some_are_down=some_are_down)
    elif settings.node.slots is SlotsMode.PER_GPU and len(gpus) > 1:
        each = max(1, cores // len(gpus))
        slots = [
            SlotPlan(name=_name(gpu), worker_id="", gpus=(gpu.uuid,), cpus=tuple(cpus), cores=each) for gpu in gpus
        ]
    else:
        uuids = tuple(gpu.uuid for gpu in gpus)
        slots = [SlotPlan(name=ONLY, worker_id="", gpus=uuids, cpus=tuple(cpus), cores=cores)]
    _check_slices(slots, gpus, settings)
    alone = len(settings.slots or slots) == 1
    total = sum(len(slot.gpus) for slot in slots)
    weights = [len(slot.gpus) if total else slot.threads for slot in slots]
    return tuple(
        msgspec.structs.replace(
            slot,
            worker_id=worker_id if alone else f"{worker_id}-{slot.name}",
            share=weight / sum(weights),
        )
        for slot, weight in zip(slots, weights, strict=True)
    )


def _check_slices(slots: Sequence[SlotPlan], gpus: Sequence[GpuInfo], settings: Settings) -> None:
    """CUDA shows a process one MIG slice, however many it is given.

    https://docs.nvidia.com/datacenter/tesla/mig-user-guide/ (device enumeration)
    """
    slices = {gpu.uuid for gpu in gpus if gpu.mig is not None}
    for slot in slots:
        if len(slot.gpus) > 1 and slices.intersection(slot.gpus):
            where = f"slots: {slot.name!r}" if settings.slots else "node.slots: its one slot"
            remedy = "give each a slot of its own" if settings.slots else "set it to 'per-gpu'"
            raise ConfigError(
                f"{where} has {len(slot.gpus)} GPUs, MIG slices among them, and CUDA lets a task use one slice and "
                f"nothing else; {remedy}"
            )


def _name(gpu: GpuInfo) -> str:
    """`gpu0`; for slices of one board `gpu0-1-0`, `gpu0-2-0` by their instances."""
    return f"gpu{gpu.index}" + ("" if gpu.mig is None else f"-{gpu.mig.gpu_instance}-{gpu.mig.compute_instance}")


def _listed(
    settings: Settings, gpus: Sequence[GpuInfo], cpus: Sequence[int], cores: int, *, some_are_down: bool
) -> list[SlotPlan]:
    named = {cpu for slot in settings.slots if slot.cpus is not None for cpu in cpu_numbers(slot.cpus)}
    rest = tuple(cpu for cpu in cpus if cpu not in named)
    sharing = sum(slot.cpus is None for slot in settings.slots)
    taken: dict[str, str] = {}
    slots = []
    for index, slot in enumerate(settings.slots):
        key = f"slots[{index}]"
        uuids = []
        for at, entry in enumerate(slot.gpus):
            try:
                uuid = find_gpu(gpus, str(entry), f"{key}.gpus[{at}]").uuid
            except NoSuchGpuError:
                if some_are_down:
                    continue
                raise
            if uuid in taken:
                raise ConfigError(f"{key}.gpus[{at}]: {entry!r} is {uuid}, which is in slot {taken[uuid]!r} already")
            taken[uuid] = slot.name
            uuids.append(uuid)
        if slot.gpus and not uuids:
            continue
        own = rest if slot.cpus is None else cpu_numbers(slot.cpus)
        if absent := [cpu for cpu in own if cpu not in cpus]:
            raise ConfigError(f"{key}.cpus: there is no CPU {absent[0]} for this node; it has: {cpu_list(cpus)}")
        if not own:
            raise ConfigError(f"{key}.cpus: missing; the other slots have all of this node's CPUs ({cpu_list(cpus)})")
        count = len(own) // sharing if slot.cpus is None else len(own)
        slots.append(
            SlotPlan(name=slot.name, worker_id="", gpus=tuple(uuids), cpus=own, cores=max(1, min(count, cores)))
        )
    if not slots:
        raise DeviceError("slots: none of the GPUs that they name works now; `flowmesh doctor` says more")
    return slots


def cpu_list(cpus: Sequence[int]) -> str:
    """`0-7,16`"""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


class Slot(Generic[RunT]):
    """The queue of one slot. Nothing here waits or acts; the executor does.

    Args:
        needs_open: whether a task has to wait while the slot is closed; by default each has.
    """

    def __init__(self, plan: SlotPlan, needs_open: Callable[[RunT], bool] = lambda _run: True) -> None:
        self.plan = plan
        self._users: list[RunT] = []
        self.queue: deque[RunT] = deque()
        self.closed = ""
        """Why the slot takes no task now; empty where it does."""
        self.paused = ""
        """Why it starts nothing at all now, whatever a task needs; empty where it does."""
        self._needs_open = needs_open

    @property
    def current(self) -> RunT | None:
        """The task that has the slot. After a restart with fewer slots it may have several; then the first of them."""
        return self._users[0] if self._users else None

    @property
    def idle(self) -> bool:
        return self.current is None and not self.queue

    @property
    def trouble(self) -> str:
        """Why the slot is not as it should be; empty where it is."""
        return self.paused or self.closed

    def next(self) -> RunT | None:
        """Take the next task, where the slot is free and somebody waits who may have it."""
        if self.current is not None or self.paused:
            return None
        run = next((run for run in self.queue if not (self.closed and self._needs_open(run))), None)
        if run is not None:
            self.queue.remove(run)
            self._users.append(run)
        return run

    def resume(self, run: RunT) -> None:
        """It has the slot already, since before a restart."""
        self._users.append(run)

    def free(self, run: RunT) -> None:
        self._users.remove(run)
