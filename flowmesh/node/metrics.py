"""What a heartbeat carries: uptime, cost, load, power and energy of one worker, and faults of its GPUs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from loguru import logger

from flowmesh.errors import DeviceError
from flowmesh.node.devices import GpuInfo, GpuReading
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.power import PowerMeter

SAMPLE_WAIT_S = 0.05
"""A heartbeat waits this long for the driver; without an answer it carries the previous sample's numbers."""


class HeartbeatObserver:
    """Receives the GPU samples that a Reporter takes for each heartbeat. The defaults do nothing."""

    def on_readings(self, readings: Mapping[str, GpuReading]) -> None:
        """The worker's GPUs were sampled."""

    def on_driver_error(self, error: DeviceError) -> None:
        """The driver did not answer."""

    def notes(self) -> dict[str, Any]:
        """Further fields of the heartbeat."""
        return {}


class Reporter:
    """One worker's numbers.

    Args:
        power: shared by the workers of a node.
        started: when the node started, on the monotonic clock.
        cpu_share: this worker's part of the node's CPU power.
        observer: receives the samples.
    """

    def __init__(
        self,
        power: PowerMeter,
        nvml: Nvml,
        gpus: Sequence[GpuInfo],
        *,
        cost_per_hour: float,
        started: float,
        cpu_share: float = 1.0,
        observer: HeartbeatObserver | None = None,
    ) -> None:
        self._power = power
        self._nvml = nvml
        self._gpus = gpus
        self._cost_per_hour = cost_per_hour
        self._started = started
        self._cpu_share = cpu_share
        self._observer = observer or HeartbeatObserver()
        self._driver_failed = False
        self._sampling: asyncio.Task[None] | None = None

    async def heartbeat(self) -> dict[str, Any]:
        """The `metrics` of a HEARTBEAT. Takes no longer than SAMPLE_WAIT_S, even if the driver hangs."""
        await self._observe()
        summary = msgspec.to_builtins(self._power.summary(self._gpus, self._cpu_share))
        loads = os.getloadavg()
        return {
            **self._account(),
            "loadavg": dict(zip(("1m", "5m", "15m"), loads, strict=True)),
            "power": msgspec.to_builtins(self._power.power(self._gpus, self._cpu_share)),
            "power_summary": summary,
            "estimated_energy_kwh": summary["estimated_energy_kwh"],
            **self._observer.notes(),
        }

    def power(self) -> dict[str, Any]:
        """`power_metrics` of a REGISTER."""
        self._power.observe()
        return dict(msgspec.to_builtins(self._power.power(self._gpus, self._cpu_share)))

    def farewell(self) -> dict[str, Any]:
        """The payload of an UNREGISTER."""
        return {
            "cost_per_hour": self._cost_per_hour,
            **self._account(),
            "power_summary": msgspec.to_builtins(self._power.summary(self._gpus, self._cpu_share)),
        }

    def _account(self) -> dict[str, float]:
        uptime_s = time.monotonic() - self._started
        return {
            "uptime_sec": round(uptime_s, 3),
            "accrued_cost_usd": round(self._cost_per_hour / 3600 * uptime_s, 9),
        }

    async def _observe(self) -> None:
        if self._gpus:
            if self._sampling is None or self._sampling.done():
                self._sampling = asyncio.create_task(self._sample())
            done, _ = await asyncio.wait({self._sampling}, timeout=SAMPLE_WAIT_S)
            if done:
                self._sampling.result()
                return
        self._power.observe()

    async def _sample(self) -> None:
        try:
            readings = await self._nvml.sample([gpu.uuid for gpu in self._gpus])
        except DeviceError as error:
            if not self._driver_failed:
                logger.warning("heartbeats carry no GPU metrics until the driver answers again: {}", error)
            self._driver_failed = True
            self._power.observe()
            self._observer.on_driver_error(error)
            return
        self._driver_failed = False
        self._power.observe(readings)
        self._observer.on_readings(readings)
