"""What a heartbeat carries: uptime, cost, load, power and energy of one worker."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from loguru import logger

from flowmesh.errors import DeviceError
from flowmesh.node.devices import GpuInfo
from flowmesh.node.nvml import Nvml
from flowmesh.node.power import PowerMeter


class Reporter:
    """One worker's numbers. `power` is shared by the workers of a node."""

    def __init__(
        self, power: PowerMeter, nvml: Nvml, gpus: Sequence[GpuInfo], *, cost_per_hour: float, started: float
    ) -> None:
        self._power = power
        self._nvml = nvml
        self._gpus = gpus
        self._cost_per_hour = cost_per_hour
        self._started = started
        self._deaf = False

    async def heartbeat(self) -> dict[str, Any]:
        """The `metrics` of a HEARTBEAT."""
        await self._observe()
        summary = msgspec.to_builtins(self._power.summary(self._gpus))
        loads = os.getloadavg()
        return {
            **self._account(),
            "loadavg": dict(zip(("1m", "5m", "15m"), loads, strict=True)),
            "power": msgspec.to_builtins(self._power.power(self._gpus)),
            "power_summary": summary,
            "estimated_energy_kwh": summary["estimated_energy_kwh"],
        }

    def power(self) -> dict[str, Any]:
        """`power_metrics` of a REGISTER."""
        self._power.observe()
        return dict(msgspec.to_builtins(self._power.power(self._gpus)))

    def farewell(self) -> dict[str, Any]:
        """The payload of an UNREGISTER."""
        return {
            "cost_per_hour": self._cost_per_hour,
            **self._account(),
            "power_summary": msgspec.to_builtins(self._power.summary(self._gpus)),
        }

    def _account(self) -> dict[str, float]:
        uptime_s = time.monotonic() - self._started
        return {
            "uptime_sec": round(uptime_s, 3),
            "accrued_cost_usd": round(self._cost_per_hour / 3600 * uptime_s, 9),
        }

    async def _observe(self) -> None:
        try:
            looks = await self._nvml.sample([gpu.uuid for gpu in self._gpus])
        except DeviceError as error:
            if not self._deaf:
                logger.warning("GPU metrics are missing: {}", error)
            self._deaf = True
            self._power.observe()
            return
        self._deaf = False
        self._power.observe(looks)
