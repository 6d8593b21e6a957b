"""A task's GPUs from its start to their proven release: baseline, peak, faults, energy; and what else it used.

One loop samples the GPUs of all running tasks together, and sleeps while there are none. Tasks without GPUs never wait
for anything here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from loguru import logger

from flowmesh.errors import DeviceError
from flowmesh.execution.gpu import process_usage
from flowmesh.execution.gpu.last_readings import LastReadings
from flowmesh.execution.gpu.quarantine import Quarantine
from flowmesh.execution.gpu.task_gpus import TaskGpus
from flowmesh.execution.layout import BASELINE_FILE, Layout
from flowmesh.execution.ports import PostEvent
from flowmesh.execution.run import Run
from flowmesh.messages.job import Exit, Outcome
from flowmesh.node.devices import GpuInfo, GpuReading
from flowmesh.node.energy import Energy, ProcessUse, TaskMeter
from flowmesh.node.health import Finding, GpuHealth
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.power import PowerMeter
from flowmesh.node.release_proof import ReleaseProof
from flowmesh.node.release_report import ReleaseReport
from flowmesh.node.release_state import Baseline
from flowmesh.node.slots import Slot
from flowmesh.node.xid import XidVerdict
from flowmesh.results.safe_files import read_note, write_atomic
from flowmesh.settings.schema import GpuSettings
from flowmesh.tasks import machine
from flowmesh.tasks.verdicts import Stop

LAST_WORD_S = 1.0
"""How long the verdict on a failed GPU task waits for the driver's error events."""
LOST_SAMPLES = 3
"""A task is stopped when one of its GPUs did not answer this many samples in a row."""

UNKNOWN = Energy(gpu_joules=None, cpu_joules=None, kwh=None)


class GpuMonitor:
    def __init__(
        self,
        *,
        settings: GpuSettings,
        layout: Layout,
        slots: Mapping[str, Slot[Run]],
        nvml: Nvml,
        power: PowerMeter,
        gpus: Sequence[GpuInfo],
        health: GpuHealth,
        quarantine: Quarantine,
        post: PostEvent,
    ) -> None:
        self.health = health
        self._quarantine = quarantine
        self._settings = settings
        self._layout = layout
        self._slots = slots
        self._nvml = nvml
        self._power = power
        self._gpus = {gpu.uuid: gpu for gpu in gpus}
        self.last = LastReadings(gpus)
        self._post = post
        self._tasks: dict[int, TaskGpus] = {}
        """By attempt: the running tasks that have GPUs."""
        self._meters: dict[int, TaskMeter] = {}
        """By attempt: of tasks without GPUs, if the CPU's energy is known."""
        self._busy = asyncio.Event()
        self._silent = False
        """Whether the last sample got no answer."""

    async def begin(self, run: Run) -> machine.Event | None:
        """Take the baseline of the task's GPUs.

        Returns:
            the next event of a task that must not start; None if it may.
        """
        if not run.gpus:
            if self._power.cpu_unavailable is None:
                self._power.observe()
                self._meters[run.attempt] = TaskMeter((), self._power.totals())
            return None
        proof = self._proof(run)
        try:
            await self._take_events()
            reason = await self._quarantine.objection(run.gpus, await proof.begin())
            readings = await self._nvml.sample(run.gpus) if not reason else {}
        except DeviceError as error:
            reason = str(error)
        if reason:
            return self._quarantine.met(run, reason)
        self.health.cleared(run.gpus)
        self._power.observe(readings)
        self.last.take(readings)
        file = self._layout.spool(run.attempt) / BASELINE_FILE
        await asyncio.to_thread(write_atomic, file, msgspec.json.encode(proof.baselines), private=True)
        self._add(run, proof, whole=True)
        return None

    def cancel(self, run: Run) -> None:
        """The task was not forked after all: it has used nothing."""
        self._tasks.pop(run.attempt, None)
        self._meters.pop(run.attempt, None)

    def resume(self, run: Run) -> TaskGpus | None:
        """Take over a task that an earlier supervisor started; None if it has no GPUs, or had not begun to use them."""
        if not run.gpus or run.attempt in self._tasks:
            return self._tasks.get(run.attempt)
        baselines = read_note(self._layout.spool(run.attempt) / BASELINE_FILE, dict[str, Baseline])
        if baselines is None:
            return None
        proof = self._proof(run)
        proof.resume({uuid: baseline for uuid, baseline in baselines.items() if uuid in self._gpus})
        run.gpus = tuple(proof.baselines)  # the slots may have changed with the restart
        return self._add(run, proof, whole=False)

    def _proof(self, run: Run) -> ReleaseProof:
        settings = self._settings
        return ReleaseProof(
            self._nvml, run.gpus, tolerance_bytes=settings.release_tolerance_bytes, allow_foreign=settings.allow_foreign
        )

    def _add(self, run: Run, proof: ReleaseProof, *, whole: bool) -> TaskGpus:
        self._quarantine.remember(proof.baselines)
        meter = TaskMeter([self._gpus[uuid] for uuid in run.gpus], self._power.totals())
        task = self._tasks[run.attempt] = TaskGpus(run, proof, meter, whole=whole)
        self._busy.set()
        return task

    async def sample(self) -> None:
        """Sample the GPUs of running tasks, until cancelled."""
        while True:
            await self._busy.wait()
            await asyncio.sleep(self._settings.sample_interval_s)
            if not self._tasks:
                self._busy.clear()
                continue
            await self._sample()

    async def _sample(self) -> None:
        uuids = sorted({uuid for task in self._tasks.values() for uuid in task.run.gpus})
        try:
            readings = await self._nvml.sample(uuids)
            await self._take_events()
        except DeviceError as error:
            if not self._silent:
                logger.warning("GPUs of running tasks cannot be sampled: {}", error)
            self._silent = True
            return
        self._silent = False
        self._power.observe(readings)
        self.observe(readings)
        for task in list(self._tasks.values()):
            if task.lost_samples >= LOST_SAMPLES:
                reason = "; ".join(task.faults) or "its GPU does not answer"
                self._post(task.run, machine.StopRequested(Stop.GPU_FAULT, reason))
            if (pid := task.run.pid) is not None:
                use = await asyncio.to_thread(process_usage.look, pid, task.run.cgroup)
                task.use = task.use.most(use)

    async def _take_events(self) -> None:
        """Take in the driver's error events since the last call.

        Raises:
            DeviceError: the driver does not answer.
        """
        self._judge(self.health.judge(await self._nvml.events()))

    def _judge(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            bound = logger.bind(gpus=",".join(finding.uuids), verdict=finding.verdict.value)
            if finding.verdict is XidVerdict.IGNORE:
                bound.info("{}", finding.message)
                continue
            bound.warning("{}", finding.message)
            for task in self._tasks.values():
                if task.is_to_blame(finding):
                    task.faults.append(finding.message)
            if finding.verdict is XidVerdict.DEVICE:
                for slot in self._slots.values():
                    if slot.current is None and set(slot.plan.gpus) & set(finding.uuids):
                        self._quarantine.close(slot, finding.message)  # a slot with a task is closed when that ends

    def spent(self, run: Run, cost_per_hour: float) -> dict[str, float | None]:
        """What a task has cost so far, and its GPUs have used as of the last sample; null: not known.

        Args:
            cost_per_hour: of its slot, in US dollars.
        """
        task, joules = self._tasks.get(run.attempt), None
        if task is not None and task.whole:
            joules = task.meter.gpu_joules_so_far(self._power.board_joules())
        elif task is None and run.energy is not None:
            joules = run.energy["gpu_joules"]  # it has ended, and is delivered
        return {
            "cost_usd": round(cost_per_hour / 3600 * run.runtime_s, 9),
            "gpu_joules": None if joules is None else round(joules, 3),
        }

    async def fault_of(self, run: Run, exit_: Exit, outcome: Outcome | None) -> str:
        """The faults that the driver reported of a failed task's GPUs; empty if there were none."""
        task = self._tasks.get(run.attempt)
        if task is None or (exit_.code == 0 and outcome is not None and outcome.ok):
            return ""
        taking = asyncio.create_task(self._try_take_events())
        await asyncio.wait({taking}, timeout=LAST_WORD_S)  # not cancelled: events that come later still count
        return "; ".join(dict.fromkeys(task.faults))

    async def _try_take_events(self) -> None:
        try:
            await self._take_events()
        except DeviceError as error:
            logger.debug("no GPU events for a failed task: {}", error)

    async def end(self, run: Run) -> None:
        """All processes of the task are gone: wait until its GPUs are proven free, or close their slot.

        Fills the run's resources and energy.
        """
        if not run.gpus:
            self._account(run, self._meters.pop(run.attempt, None), ProcessUse(), None)
            return
        task = self.resume(run)
        if task is None:  # it never used them
            return
        pids = task.pids if run.pid is None else {*task.pids, run.pid}  # a short task may end before any sample
        report = await task.proof.wait_released(pids, self._settings.release_timeout_s)
        try:
            self._power.observe(readings := await self._nvml.sample(run.gpus))
            self.last.take(readings)
        except DeviceError as error:
            logger.debug("no energy reading at the end of a task: {}", error)
        del self._tasks[run.attempt]
        use = ProcessUse(read_bytes=task.use.read_bytes, written_bytes=task.use.written_bytes)
        self._account(run, task.meter, use, report, task)
        if not report.released:
            self._quarantine.close(run.slot, str(report))
        elif condemned := self.health.condemned(run.gpus):
            self._quarantine.close(run.slot, "; ".join(condemned.values()))
        else:
            self.health.cleared(run.gpus)
            logger.bind(task=run.task_id).debug("{}", report)

    def _account(
        self,
        run: Run,
        meter: TaskMeter | None,
        use: ProcessUse,
        report: ReleaseReport | None,
        task: TaskGpus | None = None,
    ) -> None:
        """Add what the kernel's accounting of the first process leaves out."""
        if meter is None:
            return
        cpu_s, rss_bytes = run.resources.get("cpu_seconds"), run.resources.get("peak_rss_bytes")
        if task is not None:
            cpu_s = max(cpu_s or 0.0, task.use.cpu_s or 0.0)
            rss_bytes = max(rss_bytes or 0, task.use.peak_rss_bytes or 0)
        use = msgspec.structs.replace(use, cpu_seconds=cpu_s, peak_rss_bytes=rss_bytes)
        self._power.observe()
        usage = meter.finish(
            self._power.totals(), runtime_s=run.runtime_s, cost_per_hour=0.0, processes=use, release=report
        )
        whole = task is None or task.whole
        run.energy = msgspec.to_builtins(usage.energy if whole else UNKNOWN)
        found: dict[str, Any] = msgspec.to_builtins(usage.resources)
        if not run.gpus:
            del found["gpus"]
        run.resources |= {name: value for name, value in found.items() if value is not None}

    async def check_idle_slots(self) -> None:
        """Before the node reports IDLE: close the slots whose GPUs must not be used."""
        for slot in self._slots.values():
            if slot.plan.gpus and slot.current is None:
                await self.check_idle(slot)

    def observe(self, readings: Mapping[str, GpuReading]) -> None:
        """Use a sample that was taken for another purpose (a heartbeat) for the running tasks too."""
        self.last.take(readings)
        for task in self._tasks.values():
            task.observe(readings)
        self._judge(self.health.observe(readings))

    async def check_idle(self, slot: Slot[Run]) -> None:
        """Close an idle slot whose GPUs must not be used."""
        try:
            await self._take_events()
            readings = await self._nvml.sample(slot.plan.gpus, memory_only=True)
            reason = await self._quarantine.objection(slot.plan.gpus, readings)
        except DeviceError as error:
            reason = str(error)
        if reason and slot.current is None:
            self._quarantine.close(slot, reason)
