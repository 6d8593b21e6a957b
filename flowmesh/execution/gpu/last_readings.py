"""The last reading of each GPU, whoever took it: the sampling of running tasks, or a heartbeat."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from flowmesh.node.devices import GpuInfo, GpuLost, GpuReading, GpuSample


class LastReadings:
    """
    Args:
        gpus: those that the node may offer.
    """

    def __init__(self, gpus: Sequence[GpuInfo]) -> None:
        self._gpus = {gpu.uuid: gpu for gpu in gpus}
        self._last: dict[str, tuple[float, GpuReading]] = {}

    def take(self, readings: Mapping[str, GpuReading]) -> None:
        """Keep these. A reading of the memory alone does not replace a whole one: pass whole ones only."""
        now = time.monotonic()
        for uuid in self._gpus.keys() & readings.keys():
            self._last[uuid] = (now, readings[uuid])

    def listed(self, uuids: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The GPUs with their last readings; what is not known is null.

        Args:
            uuids: only these; None: all.
        """
        return [self._described(gpu) for uuid, gpu in self._gpus.items() if uuids is None or uuid in uuids]

    def _described(self, gpu: GpuInfo) -> dict[str, Any]:
        at, reading = self._last.get(gpu.uuid, (None, None))
        sample = reading if isinstance(reading, GpuSample) else None
        return {
            "uuid": gpu.uuid,
            "index": gpu.index,
            "name": gpu.name,
            "mig": gpu.mig is not None,
            "memory_total_bytes": gpu.memory_total_bytes,
            "memory_used_bytes": sample.used_bytes if sample else None,
            "utilization_percent": sample.utilization_percent if sample else None,
            "power_w": sample.power_w if sample else None,
            "temperature_c": sample.temperature_c if sample else None,
            "throttled": list(sample.throttled) if sample else [],
            "trouble": reading.why if isinstance(reading, GpuLost) else None,
            "sampled_s_ago": None if at is None else round(time.monotonic() - at, 1),
        }
