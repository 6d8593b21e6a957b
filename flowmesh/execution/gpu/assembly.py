"""Builds the GPU monitor with the quarantine that it reports to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowmesh.execution.conditions import Conditions
from flowmesh.execution.gpu.canary import Canaries
from flowmesh.execution.gpu.monitor import GpuMonitor
from flowmesh.execution.gpu.quarantine import Quarantine
from flowmesh.execution.layout import Layout
from flowmesh.execution.ports import PostEvent
from flowmesh.execution.run import Run
from flowmesh.execution.run_table import RunTable
from flowmesh.node.devices import GpuInfo
from flowmesh.node.health import GpuHealth
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.power import PowerMeter
from flowmesh.node.slots import Slot
from flowmesh.settings.schema import GpuSettings


def make_monitor(
    *,
    settings: GpuSettings,
    layout: Layout,
    slots: Mapping[str, Slot[Run]],
    runs: RunTable,
    nvml: Nvml,
    power: PowerMeter,
    gpus: Sequence[GpuInfo],
    canaries: Canaries,
    conditions: Conditions,
    post: PostEvent,
) -> GpuMonitor:
    """
    Args:
        gpus: those that the node may offer.
    """
    health = GpuHealth(gpus)
    quarantine = Quarantine(
        settings=settings,
        runs=runs,
        nvml=nvml,
        health=health,
        canaries=canaries,
        conditions=conditions,
    )
    return GpuMonitor(
        settings=settings,
        layout=layout,
        slots=slots,
        nvml=nvml,
        power=power,
        gpus=gpus,
        health=health,
        quarantine=quarantine,
        post=post,
    )
