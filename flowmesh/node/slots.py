"""A slot: the devices that one task at a time may use, and the queue of tasks that wait for them.

`plan` divides a node into slots as the settings ask; the orchestrator sees each slot as a separate worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from flowmesh.errors import ConfigError
from flowmesh.node.devices import GpuInfo, NoSuchGpuError, find_gpu, is_whole_uuid
from flowmesh.settings.checks import cpu_numbers
from flowmesh.settings.schema import Settings
from flowmesh.settings.types import SlotsMode

RunT = TypeVar("RunT")

ONLY = "main"
"""The name of a node's only slot, where the settings do not name it."""


class SlotPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The devices and the share of one slot."""

    name: str
    worker_id: str
    gpus: tuple[str, ...] = ()
    """UUIDs."""
    missing: tuple[str, ...] = ()
    """Entries of the settings or of CUDA_VISIBLE_DEVICES that name GPUs which are not there now."""
    cpus: tuple[int, ...] = ()
    """Numbers of the CPUs that its tasks may run on."""
    cores: int = 0
    """How many of them it may keep busy, where it shares them with other slots; 0: all."""
    share: float = 1.0
    """Its part of the node's cost, from 0 to 1."""

    @property
    def threads(self) -> int:
        return self.cores or max(1, len(self.cpus))

    def gpus_for(self, count: int | None) -> tuple[str, ...]:
        """The GPUs that a task sees which requests `count` (at most all of them); None: all."""
        return self.gpus if count is None else self.gpus[:count]


def plan(
    settings: Settings,
    worker_id: str,
    gpus: Sequence[GpuInfo],
    cpus: Sequence[int],
    cores: int,
    *,
    some_are_down: bool = False,
    missing: tuple[str, ...] = (),
) -> tuple[SlotPlan, ...]:
    """The node's slots.

    Args:
        worker_id: the node's id; with more than one slot, each slot's is `<worker_id>-<slot name>`.
        gpus: the GPUs that the node may offer.
        cpus: the numbers of the CPUs that the node may use.
        cores: how many of them it can keep busy at once (a cgroup quota may be less).
        some_are_down: GPUs that a slot names and that there are not may come back.
        missing: entries of CUDA_VISIBLE_DEVICES that name no GPU that is there.

    Raises:
        ConfigError: a slot cannot be made as configured; names its key.
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
        slots = [SlotPlan(name=ONLY, worker_id="", gpus=uuids, missing=missing, cpus=tuple(cpus), cores=cores)]
    _check_slices(slots, gpus, settings)
    alone = len(settings.slots or slots) == 1
    named = [len(slot.gpus) + len(slot.missing) for slot in slots]
    weights = named if sum(named) else [slot.threads for slot in slots]
    return tuple(
        msgspec.structs.replace(
            slot,
            worker_id=worker_id if alone else f"{worker_id}-{slot.name}",
            share=weight / sum(weights),
        )
        for slot, weight in zip(slots, weights, strict=True)
    )


def _check_slices(slots: Sequence[SlotPlan], gpus: Sequence[GpuInfo], settings: Settings) -> None:
    """CUDA lets a process see one MIG slice, however many it is given.

    https://docs.nvidia.com/datacenter/tesla/mig-user-guide/ (device enumeration)
    """
    slices = {gpu.uuid for gpu in gpus if gpu.mig is not None}
    for slot in slots:
        if len(slot.gpus) > 1 and slices.intersection(slot.gpus):
            where = f"slots: {slot.name!r}" if settings.slots else "node.slots: its only slot"
            remedy = "give each slice its own slot" if settings.slots else "set it to 'per-gpu'"
            raise ConfigError(
                f"{where} has {len(slot.gpus)} GPUs, some of them MIG slices, but a CUDA process can use one "
                f"slice and nothing else; {remedy}"
            )


def _name(gpu: GpuInfo) -> str:
    """`gpu0`; for MIG slices `gpu0-1-0` with the GPU instance and the compute instance."""
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
        uuids: list[str] = []
        missing: list[str] = []
        for at, entry in enumerate(slot.gpus):
            try:
                uuid = find_gpu(gpus, str(entry), f"{key}.gpus[{at}]").uuid
            except NoSuchGpuError:
                if some_are_down or is_whole_uuid(str(entry)):
                    missing.append(str(entry))
                    continue
                raise
            if uuid in taken:
                raise ConfigError(f"{key}.gpus[{at}]: {entry!r} is {uuid}, which is already in slot {taken[uuid]!r}")
            taken[uuid] = slot.name
            uuids.append(uuid)
        own = rest if slot.cpus is None else cpu_numbers(slot.cpus)
        if absent := [cpu for cpu in own if cpu not in cpus]:
            raise ConfigError(f"{key}.cpus: there is no CPU {absent[0]} for this node; it has: {cpu_list(cpus)}")
        if not own:
            raise ConfigError(f"{key}.cpus: missing; the other slots have all of this node's CPUs ({cpu_list(cpus)})")
        count = len(own) // sharing if slot.cpus is None else len(own)
        slots.append(
            SlotPlan(
                name=slot.name,
                worker_id="",
                gpus=tuple(uuids),
                missing=tuple(missing),
                cpus=own,
                cores=max(1, min(count, cores)),
            )
        )
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


class SlotFault(msgspec.Struct, frozen=True, kw_only=True):
    """Why a slot starts some or all tasks not now."""

    reason: str
    concerns: Callable[[Any], bool] | None = None
    """Whether a task must wait for it; None: every task."""
    partial: bool = False
    """Whether the slot is degraded only while a task waits for it: the other types run."""


class Slot(Generic[RunT]):
    """The queue of one slot: pure bookkeeping, driven by the executor."""

    def __init__(self, plan: SlotPlan) -> None:
        self.plan = plan
        self._users: list[RunT] = []
        self.queue: deque[RunT] = deque()
        self.faults: dict[str, SlotFault] = {}
        """By name: what keeps tasks from being started here. Set by the node's conditions."""
        self.displaced = ""
        """Why the slot's worker gets no new tasks, though those that wait may start; empty: it gets them."""

    @property
    def current(self) -> RunT | None:
        """The task that has the slot; the first one where, after a restart with fewer slots, several have it."""
        return self._users[0] if self._users else None

    @property
    def idle(self) -> bool:
        return self.current is None and not self.queue

    @property
    def trouble(self) -> str:
        """Why the slot is degraded; empty: it is not."""
        reasons = [fault.reason for fault in self.faults.values() if not fault.partial or self._waits_for(fault)]
        return "; ".join([self.displaced, *reasons] if self.displaced else reasons)

    def objection(self, run: RunT) -> str:
        """Why this task must wait even where the slot is free; empty: it need not."""
        found = (each.reason for each in self.faults.values() if each.concerns is None or each.concerns(run))
        return next(found, "")

    def next(self) -> RunT | None:
        """Give the slot to the next task that may have it; None where the slot is taken or no such task waits."""
        if self.current is not None:
            return None
        run = next((run for run in self.queue if not self.objection(run)), None)
        if run is not None:
            self.queue.remove(run)
            self._users.append(run)
        return run

    def resume(self, run: RunT) -> None:
        """Record a task that had the slot before a restart."""
        self._users.append(run)

    def free(self, run: RunT) -> None:
        self._users.remove(run)

    def _waits_for(self, fault: SlotFault) -> bool:
        return any(fault.concerns is None or fault.concerns(run) for run in self.queue)
