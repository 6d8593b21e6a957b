"""A task's GPUs from just before it to their proven release: baseline, peak, faults, energy; and what it used besides.

One loop looks at the GPUs of all running tasks together, and sleeps while there are none. Tasks without GPUs never
wait for anything here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from loguru import logger

from flowmesh.errors import DeviceError
from flowmesh.execution import layout
from flowmesh.execution.gpu import process_usage
from flowmesh.execution.gpu.quarantine import Quarantine
from flowmesh.execution.gpu.task_gpus import Watched
from flowmesh.execution.run import Run
from flowmesh.messages.job import Exit, Outcome
from flowmesh.node.devices import GpuInfo, Look
from flowmesh.node.energy import Energy, ProcessUse, TaskMeter
from flowmesh.node.gpu import Baseline, ReleaseProof, ReleaseReport
from flowmesh.node.health import Finding, GpuHealth
from flowmesh.node.metrics import Watch
from flowmesh.node.nvml import Nvml
from flowmesh.node.power import PowerMeter
from flowmesh.node.slots import Slot
from flowmesh.node.xid import XidVerdict
from flowmesh.results.files import read_note, write_atomic
from flowmesh.tasks import machine
from flowmesh.tasks.verdicts import Stop

if TYPE_CHECKING:
    from flowmesh.execution.executor import Executor

LAST_WORD_S = 1.0
"""How long the verdict on a failed GPU task waits for the driver to say whether it knows why."""
LOST_LOOKS = 3
"""A GPU that did not answer so many looks in a row will not carry its task any further."""

UNKNOWN = Energy(gpu_joules=None, cpu_joules=None, kwh=None)


class Devices:
    """All that the executor asks about GPUs."""

    def __init__(self, executor: Executor, nvml: Nvml, power: PowerMeter, gpus: Sequence[GpuInfo]) -> None:
        self.health = GpuHealth(gpus)
        self.quarantine = Quarantine(executor, nvml, self.health)
        self.canaries = self.quarantine.canaries
        self._executor = executor
        self._settings = executor.settings.gpu
        self._nvml = nvml
        self._power = power
        self._gpus = {gpu.uuid: gpu for gpu in gpus}
        self._watched: dict[int, Watched] = {}
        self._meters: dict[int, TaskMeter] = {}
        """Of tasks without GPUs, where the CPU's joules are known."""
        self._busy = asyncio.Event()
        self._deaf = False

    # ---- before ------------------------------------------------------------------------------------------------------

    async def begin(self, run: Run) -> str:
        """Take the task's baseline. Why it must not start; empty where it may."""
        if not run.gpus:
            if self._power.cpu_unavailable is None:
                self._power.observe()
                self._meters[run.attempt] = TaskMeter((), self._power.totals())
            return ""
        proof = self._proof(run)
        try:
            await self._hear()
            reason = await self.quarantine.objection(run.gpus, await proof.begin())
            looks = await self._nvml.sample(run.gpus) if not reason else {}
        except DeviceError as error:
            reason = str(error)
        if reason:
            self.quarantine.close(run.slot, reason)
            return f"the task was not started: {reason}"
        self.health.cleared(run.gpus)
        self._power.observe(looks)
        file = self._executor.layout.spool(run.attempt) / layout.BASELINE_FILE
        await asyncio.to_thread(write_atomic, file, msgspec.json.encode(proof.baselines), private=True)
        self._watch(run, proof, whole=True)
        return ""

    def resume(self, run: Run) -> Watched | None:
        """Take over a task that an earlier supervisor began; None where it has no GPUs, or had not begun."""
        if not run.gpus or run.attempt in self._watched:
            return self._watched.get(run.attempt)
        baselines = read_note(self._executor.layout.spool(run.attempt) / layout.BASELINE_FILE, dict[str, Baseline])
        if baselines is None:
            return None
        proof = self._proof(run)
        proof.resume({uuid: baseline for uuid, baseline in baselines.items() if uuid in self._gpus})
        run.gpus = tuple(proof.baselines)  # the slots may have been cut anew since
        return self._watch(run, proof, whole=False)

    def _proof(self, run: Run) -> ReleaseProof:
        wants = self._settings
        return ReleaseProof(
            self._nvml, run.gpus, tolerance_bytes=wants.release_tolerance_bytes, allow_foreign=wants.allow_foreign
        )

    def _watch(self, run: Run, proof: ReleaseProof, *, whole: bool) -> Watched:
        self.quarantine.remember(proof.baselines)
        meter = TaskMeter([self._gpus[uuid] for uuid in run.gpus], self._power.totals())
        watched = self._watched[run.attempt] = Watched(run, proof, meter, whole=whole)
        self._busy.set()
        return watched

    # ---- while it runs -----------------------------------------------------------------------------------------------

    async def sample(self) -> None:
        """Look at the GPUs of running tasks, until cancelled."""
        while True:
            await self._busy.wait()
            await asyncio.sleep(self._settings.sample_interval_s)
            if not self._watched:
                self._busy.clear()
                continue
            await self._look()

    async def _look(self) -> None:
        uuids = sorted({uuid for watched in self._watched.values() for uuid in watched.run.gpus})
        try:
            looks = await self._nvml.sample(uuids)
            await self._hear()
        except DeviceError as error:
            if not self._deaf:
                logger.warning("running GPU tasks are not watched: {}", error)
            self._deaf = True
            return
        self._deaf = False
        self._power.observe(looks)
        self.observe(looks)
        for watched in list(self._watched.values()):
            if watched.lost_looks >= LOST_LOOKS:
                stop = machine.StopRequested(Stop.GPU_FAULT, "; ".join(watched.faults) or "its GPU does not answer")
                self._executor.apply(watched.run, stop)
            if (pid := watched.run.pid) is not None:
                use = await asyncio.to_thread(process_usage.look, pid, watched.run.cgroup)
                watched.use = watched.use.most(use)

    async def _hear(self) -> None:
        """Take in what the driver reported since the last time.

        Raises:
            DeviceError: it does not answer.
        """
        self._judge(self.health.judge(await self._nvml.events()))

    def _judge(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            told = logger.bind(gpus=",".join(finding.uuids), verdict=finding.verdict.value)
            if finding.verdict is XidVerdict.IGNORE:
                told.info("{}", finding.message)
                continue
            told.warning("{}", finding.message)
            blamed = [watched for watched in self._watched.values() if watched.is_to_blame(finding)]
            for watched in blamed:
                watched.faults.append(finding.message)
            if finding.verdict is XidVerdict.DEVICE:
                for slot in self._executor.slots.values():
                    if slot.current is None and set(slot.plan.gpus) & set(finding.uuids):
                        self.quarantine.close(slot, finding.message)  # one with a task is closed when that ends

    # ---- after -------------------------------------------------------------------------------------------------------

    async def fault_of(self, run: Run, exit_: Exit, outcome: Outcome | None) -> str:
        """What the driver knows of a GPU task that failed; empty where nothing."""
        watched = self._watched.get(run.attempt)
        if watched is None or (exit_.code == 0 and outcome is not None and outcome.ok):
            return ""
        hearing = asyncio.create_task(self._hear_out())
        await asyncio.wait({hearing}, timeout=LAST_WORD_S)  # not cancelled: what it hears later is not lost
        return "; ".join(dict.fromkeys(watched.faults))

    async def _hear_out(self) -> None:
        try:
            await self._hear()
        except DeviceError as error:
            logger.debug("a failed task's GPU events are not known: {}", error)

    async def end(self, run: Run) -> None:
        """Its processes are gone: wait until its GPUs are back, or close their slot. Fills resources and energy."""
        if not run.gpus:
            self._account(run, self._meters.pop(run.attempt, None), ProcessUse(), None)
            return
        watched = self.resume(run)
        if watched is None:  # it never had them
            return
        pids = watched.pids if run.pid is None else {*watched.pids, run.pid}  # a short one is gone before any look
        report = await watched.proof.wait_released(pids, self._settings.release_timeout_s)
        try:
            self._power.observe(await self._nvml.sample(run.gpus))
        except DeviceError as error:
            logger.debug("a task's last joules are not counted: {}", error)
        del self._watched[run.attempt]
        use = ProcessUse(read_bytes=watched.use.read_bytes, written_bytes=watched.use.written_bytes)
        self._account(run, watched.meter, use, report, watched)
        if not report.released:
            self.quarantine.close(run.slot, str(report))
        elif condemned := self.health.condemned(run.gpus):
            self.quarantine.close(run.slot, "; ".join(condemned.values()))
        else:
            self.health.cleared(run.gpus)
            logger.bind(task=run.task_id).debug("{}", report)

    def _account(
        self,
        run: Run,
        meter: TaskMeter | None,
        use: ProcessUse,
        report: ReleaseReport | None,
        watched: Watched | None = None,
    ) -> None:
        """Fill in what the kernel's word on its first process leaves out."""
        if meter is None:
            return
        cpu_s, rss_bytes = run.resources.get("cpu_seconds"), run.resources.get("peak_rss_bytes")
        if watched is not None:
            cpu_s = max(cpu_s or 0.0, watched.use.cpu_s or 0.0)
            rss_bytes = max(rss_bytes or 0, watched.use.peak_rss_bytes or 0)
        use = msgspec.structs.replace(use, cpu_seconds=cpu_s, peak_rss_bytes=rss_bytes)
        self._power.observe()
        usage = meter.finish(
            self._power.totals(), runtime_s=run.runtime_s, cost_per_hour=0.0, processes=use, release=report
        )
        whole = watched is None or watched.whole
        run.energy = msgspec.to_builtins(usage.energy if whole else UNKNOWN)
        found: dict[str, Any] = msgspec.to_builtins(usage.resources)
        if not run.gpus:
            del found["gpus"]
        run.resources |= {name: value for name, value in found.items() if value is not None}

    # ---- while nothing runs ------------------------------------------------------------------------------------------

    async def first_look(self) -> None:
        """Before the node says that it is idle: whether it may."""
        for slot in self._executor.slots.values():
            if slot.plan.gpus and slot.current is None:
                await self.look_at_idle(slot)

    def watch(self, slot: Slot[Run]) -> Watch:
        return _IdleWatch(self, self._executor, slot)

    def observe(self, looks: Mapping[str, Look]) -> None:
        """Somebody looked at GPUs anyway: what running tasks have there is told by this look, too."""
        for watched in self._watched.values():
            watched.observe(looks)
        self._judge(self.health.observe(looks))

    async def look_at_idle(self, slot: Slot[Run]) -> None:
        """Close the slot where its GPUs must not be worked on."""
        try:
            await self._hear()
            looks = await self._nvml.sample(slot.plan.gpus, memory_only=True)
            reason = await self.quarantine.objection(slot.plan.gpus, looks)
        except DeviceError as error:
            reason = str(error)
        if reason and slot.current is None:
            self.quarantine.close(slot, reason)


class _IdleWatch(Watch):
    """Looks at an idle slot with each heartbeat, so that a stranger on its GPUs is told before a task comes."""

    def __init__(self, devices: Devices, executor: Executor, slot: Slot[Run]) -> None:
        self._devices = devices
        self._executor = executor
        self._slot = slot

    def on_looks(self, looks: Mapping[str, Look]) -> None:
        self._devices.observe(looks)
        self._look()

    def on_silence(self, error: DeviceError) -> None:  # noqa: ARG002 - it will say the same again
        self._look()

    def _look(self) -> None:
        if self._slot.current is None and not self._slot.closed:
            self._executor.spawn(self._devices.look_at_idle(self._slot))

    def notes(self) -> dict[str, Any]:
        throttled = self._devices.health.throttled(self._slot.plan.gpus)
        notes: dict[str, Any] = {"gpu_throttled": {uuid: list(why) for uuid, why in throttled.items()}}
        return (notes if throttled else {}) | ({"degraded": self._slot.closed} if self._slot.closed else {})
