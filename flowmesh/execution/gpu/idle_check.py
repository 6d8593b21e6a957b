"""Checks an idle slot's GPUs with each heartbeat, so that a foreign process on them is reported before a task comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmesh.errors import DeviceError
from flowmesh.execution.gpu.live_notes import LiveNotes
from flowmesh.execution.gpu.monitor import GpuMonitor
from flowmesh.execution.ports import Begin
from flowmesh.execution.run import Run
from flowmesh.node.devices import GpuReading
from flowmesh.node.metrics import HeartbeatObserver
from flowmesh.node.slots import Slot


class IdleCheck(HeartbeatObserver):
    def __init__(self, gpus: GpuMonitor, slot: Slot[Run], begin: Begin, live: LiveNotes) -> None:
        self._gpus = gpus
        self._slot = slot
        self._begin = begin
        self._live = live

    def on_readings(self, readings: Mapping[str, GpuReading]) -> None:
        self._gpus.observe(readings)
        self._check()

    def on_driver_error(self, error: DeviceError) -> None:  # noqa: ARG002 - the check meets the same error
        self._check()

    def _check(self) -> None:
        if self._slot.current is None and not self._slot.trouble:
            self._begin(self._gpus.check_idle(self._slot))

    def notes(self) -> dict[str, Any]:
        throttled = self._gpus.health.throttled(self._slot.plan.gpus)
        notes: dict[str, Any] = {"gpu_throttled": {uuid: list(why) for uuid, why in throttled.items()}}
        return (notes if throttled else {}) | degraded(self._slot) | self._live()


class Notes(HeartbeatObserver):
    """For a slot without GPUs."""

    def __init__(self, slot: Slot[Run], live: LiveNotes) -> None:
        self._slot = slot
        self._live = live

    def notes(self) -> dict[str, Any]:
        return degraded(self._slot) | self._live()


def degraded(slot: Slot[Run]) -> dict[str, Any]:
    """The note of a heartbeat that says why a slot starts no tasks; empty if it does."""
    return {"degraded": slot.trouble} if slot.trouble else {}
