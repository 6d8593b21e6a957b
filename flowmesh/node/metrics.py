"""What a heartbeat carries: uptime, cost, load, power and energy of one worker, and what is wrong with its GPUs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from loguru import logger

from flowmesh.errors import DeviceError
from flowmesh.node.devices import GpuInfo, Look
from flowmesh.node.nvml import Nvml
from flowmesh.node.power import PowerMeter

PATIENCE_S = 0.05
"""A heartbeat waits this long for the driver; after it the numbers are those of the look before."""


class Watch:
    """What a Reporter tells of the looks that it takes anyway. The defaults do nothing."""

    def on_looks(self, looks: Mapping[str, Look]) -> None:
        """The worker's GPUs were looked at."""

    def on_silence(self, error: DeviceError) -> None:
        """The driver did not answer."""

    def notes(self) -> dict[str, Any]:
        """What a heartbeat says besides."""
        return {}


class Reporter:
    """One worker's numbers. `power` is shared by the workers of a node.

    Args:
        cpu_share: this worker's part of the node's CPU power.
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
        watch: Watch | None = None,
    ) -> None:
        self._power = power
        self._nvml = nvml
        self._gpus = gpus
        self._cost_per_hour = cost_per_hour
        self._started = started
        self._cpu_share = cpu_share
        self._watch = watch or Watch()
        self._deaf = False
        self._looking: asyncio.Task[None] | None = None

    async def heartbeat(self) -> dict[str, Any]:
        """The `metrics` of a HEARTBEAT. Takes no longer than PATIENCE_S, whatever the driver does."""
        await self._observe()
        summary = msgspec.to_builtins(self._power.summary(self._gpus, self._cpu_share))
        loads = os.getloadavg()
        return {
            **self._account(),
            "loadavg": dict(zip(("1m", "5m", "15m"), loads, strict=True)),
            "power": msgspec.to_builtins(self._power.power(self._gpus, self._cpu_share)),
            "power_summary": summary,
            "estimated_energy_kwh": summary["estimated_energy_kwh"],
            **self._watch.notes(),
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
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look())
            done, _ = await asyncio.wait({self._looking}, timeout=PATIENCE_S)
            if done:
                self._looking.result()
                return
        self._power.observe()

    async def _look(self) -> None:
        try:
            looks = await self._nvml.sample([gpu.uuid for gpu in self._gpus])
        except DeviceError as error:
            if not self._deaf:
                logger.warning("GPU metrics are missing: {}", error)
            self._deaf = True
            self._power.observe()
            self._watch.on_silence(error)
            return
        self._deaf = False
        self._power.observe(looks)
        self._watch.on_looks(looks)
