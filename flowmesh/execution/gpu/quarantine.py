"""Quarantined GPUs: which must not be used, why, and the probe that ends it without an operator.

Each slot's GPUs are one fault of the node's conditions, which concerns the tasks that need them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from loguru import logger

from flowmesh.errors import DeviceError
from flowmesh.execution.conditions import Conditions, Fault
from flowmesh.execution.gpu.canary import Canaries
from flowmesh.execution.run import Run
from flowmesh.execution.run_table import RunTable
from flowmesh.node.devices import GpuLost, GpuReading, GpuSample
from flowmesh.node.gpu_holders import name_holders
from flowmesh.node.health import GpuHealth
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.release_proof import ReleaseProof
from flowmesh.node.release_state import Baseline, is_shared_blindly
from flowmesh.node.slots import Slot
from flowmesh.processes.tree import is_same_or_below
from flowmesh.settings.schema import GpuSettings
from flowmesh.tasks import machine
from flowmesh.tasks.machine import State

FIRST_PAUSE_S = 1.0
_ON_ITS_GPUS = (State.RUNNING, State.STOPPING, State.RELEASING)
_MIB = 1 << 20


class Quarantine:
    def __init__(
        self,
        *,
        settings: GpuSettings,
        runs: RunTable,
        nvml: Nvml,
        health: GpuHealth,
        canaries: Canaries,
        conditions: Conditions,
    ) -> None:
        self._settings = settings
        self._runs = runs
        self._nvml = nvml
        self._health = health
        self._canaries = canaries
        self._conditions = conditions
        self._faults: dict[str, Fault] = {}
        """By worker id."""
        self._floors: dict[str, int] = {}
        """Bytes: the least that each GPU had in use while no task of this node was on it."""

    async def objection(self, uuids: Sequence[str], readings: Mapping[str, GpuReading]) -> str:
        """Why no task may start on these GPUs, which have no task now; empty if one may."""
        for condemned in self._health.condemned(uuids).values():
            return condemned
        return await self._occupied(uuids, readings)

    async def _occupied(self, uuids: Sequence[str], readings: Mapping[str, GpuReading]) -> str:
        for run in self._runs:
            # After a restart with other slots, a GPU may still be used by a task of another slot.
            elsewhere = set(uuids) & set(run.gpus) and not set(uuids) <= set(run.slot.plan.gpus)
            if elsewhere and run.task.state in _ON_ITS_GPUS:
                return f"task {run.task_id} of another worker is still on one of its GPUs"
        for uuid in uuids:
            look = readings[uuid]
            if isinstance(look, GpuLost):
                return f"{uuid} does not answer: {look.why}"
            ours = [
                each for each in (*(look.processes or ()), *look.graphics) if is_same_or_below(each.pid, os.getpid())
            ]
            if ours:
                holders = ", ".join(map(str, await name_holders(ours)))
                return f"{uuid} is still held by a process of this node: {holders}"
            if look.processes and not self._settings.allow_foreign:
                holders = ", ".join(map(str, await name_holders(look.processes)))
                return f"{uuid} is used by a foreign process: {holders}"
            if is_shared_blindly(look):
                continue
            used_bytes = _unclaimed_bytes(Baseline.of(look))
            floor = self._floors[uuid] = min(used_bytes, self._floors.get(uuid, used_bytes))
            if used_bytes - floor > self._settings.release_tolerance_bytes:
                return f"{uuid} has {(used_bytes - floor) / _MIB:.0f} MiB more in use than when it was idle before"
        return ""

    def remember(self, baselines: Mapping[str, Baseline]) -> None:
        """Note what GPUs had in use before a task started: with more than that they are not idle."""
        for uuid, baseline in baselines.items():
            if any(process.used_bytes is None for process in baseline.processes):
                continue
            idle_bytes = _unclaimed_bytes(baseline)
            self._floors[uuid] = min(idle_bytes, self._floors.get(uuid, idle_bytes))

    def close(self, slot: Slot[Run], reason: str) -> None:
        """Start no GPU task in this slot from now on, and probe until one may be started again."""
        self._conditions.report(self._fault(slot), reason)

    def met(self, run: Run, reason: str) -> machine.Event:
        """Likewise; returns the next event of the task that could not be started."""
        return self._conditions.met(run, self._fault(run.slot), reason)

    def _fault(self, slot: Slot[Run]) -> Fault:
        worker_id = slot.plan.worker_id
        if (fault := self._faults.get(worker_id)) is None:
            fault = self._faults[worker_id] = Fault(
                name=f"GPUs of {worker_id}",
                probe=lambda: self._examine(slot),
                wait_s=self._settings.release_timeout_s,
                worker_ids=(worker_id,),
                concerns=lambda run: bool(run.gpus),
                first_s=FIRST_PAUSE_S,
                longest_s=self._settings.probe_interval_s,
            )
        return fault

    async def _examine(self, slot: Slot[Run]) -> str:
        """One probe; returns what is still wrong."""
        uuids = slot.plan.gpus
        try:
            readings = await self._nvml.sample(uuids, memory_only=True)
        except DeviceError as error:
            return str(error)
        self._health.observe({uuid: look for uuid, look in readings.items() if isinstance(look, GpuLost)})
        if reason := await self._occupied(uuids, readings):
            return reason
        condemned = self._health.condemned(uuids)
        if not condemned:
            return ""
        fault = "; ".join(condemned.values())
        if failed := await self._canaries.run(slot.plan):
            return f"{fault}; {failed}"
        proof = ReleaseProof(
            self._nvml,
            uuids,
            tolerance_bytes=self._settings.release_tolerance_bytes,
            allow_foreign=self._settings.allow_foreign,
        )
        proof.resume({uuid: Baseline.of(look) for uuid, look in readings.items() if isinstance(look, GpuSample)})
        report = await proof.wait_released((), self._settings.release_timeout_s)
        if not report.released:
            return f"{fault}; after the canary {report}"
        if self._health.condemned(uuids) != condemned:
            return "; ".join(self._health.condemned(uuids).values())  # another fault was reported while it ran
        self._health.readmit(uuids)
        logger.bind(worker=slot.plan.worker_id).info("GPUs usable again after {}: the canary passed", fault)
        return ""


def _unclaimed_bytes(baseline: Baseline) -> int:
    claimed = sum(process.used_bytes or 0 for process in baseline.processes)
    return max(0, baseline.used_bytes - claimed - baseline.graphics_bytes)
