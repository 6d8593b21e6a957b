"""Promise P2: after a task its GPUs are back at their baseline, and a report proves it or names what holds them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from flowmesh.errors import DeviceError
from flowmesh.node.devices import GpuLost, GpuReading, GpuSample
from flowmesh.node.gpu_holders import name_holders
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.release_report import GpuRelease, ReleaseReport
from flowmesh.node.release_state import TOLERANCE_BYTES, Baseline, GpuState, judge

_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.25


class ReleaseProof:
    """One task's GPUs, from just before the task to their proven release.

    Call `begin`, then `observe` with every sample while the task runs, then `wait_released` after its last process.
    """

    def __init__(
        self,
        nvml: Nvml,
        uuids: Sequence[str],
        *,
        tolerance_bytes: int = TOLERANCE_BYTES,
        allow_foreign: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nvml = nvml
        self._uuids = tuple(uuids)
        self._tolerance_bytes = tolerance_bytes
        self._allow_foreign = allow_foreign
        self._clock = clock
        self.baselines: dict[str, Baseline] = {}
        self.peak_bytes: dict[str, int] = {}

    async def begin(self) -> dict[str, GpuReading]:
        """Take the baseline, and return the samples that it is made of.

        Raises:
            DeviceError: a GPU does not answer; the task must not start on it.
        """
        readings = await self._nvml.sample(self._uuids, memory_only=True)
        for uuid, reading in readings.items():
            if isinstance(reading, GpuLost):
                raise DeviceError(f"{uuid} does not answer: {reading.why}")
            self.baselines[uuid] = Baseline.of(reading)
            self.peak_bytes[uuid] = reading.used_bytes
        return readings

    def resume(self, baselines: Mapping[str, Baseline]) -> None:
        """Continue from baselines that an earlier supervisor has taken and saved."""
        self.baselines = dict(baselines)
        self.peak_bytes = {uuid: baseline.used_bytes for uuid, baseline in baselines.items()}

    def observe(self, readings: Mapping[str, GpuReading]) -> None:
        """Update the peak. Readings of other GPUs are ignored."""
        for uuid in self.baselines.keys() & readings.keys():
            reading = readings[uuid]
            if isinstance(reading, GpuSample):
                self.peak_bytes[uuid] = max(self.peak_bytes[uuid], reading.used_bytes)

    async def wait_released(self, own_pids: Collection[int], timeout_s: float) -> ReleaseReport:
        """Sample until every GPU is back at its baseline, at most `timeout_s` seconds.

        Never raises for a GPU or a driver that does not answer: those GPUs are reported as lost.

        Args:
            own_pids: every process that the task ever had.
        """
        started_s = self._clock()
        pause_s = _FIRST_PAUSE_S
        while True:
            readings = await self._sample(started_s + timeout_s - self._clock())
            self.observe(readings)
            states = {
                uuid: judge(
                    baseline,
                    readings[uuid],
                    own_pids,
                    tolerance_bytes=self._tolerance_bytes,
                    allow_foreign=self._allow_foreign,
                )
                for uuid, baseline in self.baselines.items()
            }
            now_s = self._clock()
            released = all(state is GpuState.RELEASED for state in states.values())
            if released or now_s - started_s >= timeout_s:
                break
            await asyncio.sleep(min(pause_s, max(started_s + timeout_s - now_s, 0)))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        ms = round((now_s - started_s) * 1000, 3)
        gpus = {uuid: await self._describe(uuid, states[uuid], readings[uuid], own_pids) for uuid in states}
        return ReleaseReport(released=released, ms=ms, gpus=gpus)

    async def _sample(self, left_s: float) -> dict[str, GpuReading]:
        try:
            return await self._nvml.sample(tuple(self.baselines), memory_only=True)
        except DeviceError as error:
            if left_s > 0:
                await asyncio.sleep(min(_LONGEST_PAUSE_S, left_s))
            return {uuid: GpuLost(uuid, str(error)) for uuid in self.baselines}

    async def _describe(self, uuid: str, state: GpuState, reading: GpuReading, own_pids: Collection[int]) -> GpuRelease:
        before_bytes, peak_bytes = self.baselines[uuid].used_bytes, self.peak_bytes[uuid]
        pids_before = tuple(sorted(self.baselines[uuid].pids))
        if isinstance(reading, GpuLost):
            return GpuRelease(
                state=state,
                before_bytes=before_bytes,
                peak_bytes=peak_bytes,
                after_bytes=None,
                pids_before=pids_before,
                why=reading.why,
            )
        present = [] if state is GpuState.RELEASED else [*(reading.processes or ())]
        present += [process for process in reading.graphics if process.pid in own_pids]
        newcomers = [process for process in present if process.pid not in self.baselines[uuid].pids]
        return GpuRelease(
            state=state,
            before_bytes=before_bytes,
            peak_bytes=peak_bytes,
            after_bytes=reading.used_bytes,
            pids_before=pids_before,
            pids_after=tuple(sorted(reading.pids)),
            holders=await name_holders(newcomers or present, own_pids),
        )
