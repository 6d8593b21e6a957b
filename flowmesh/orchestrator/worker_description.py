"""What each worker says of itself: who and where it is, its hardware, and what its heartbeats carry."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec

from flowmesh import __version__
from flowmesh.bus.connection import redis
from flowmesh.bus.presence import Identity, Presence
from flowmesh.execution.executor import Executor
from flowmesh.execution.run import Run
from flowmesh.node import metrics
from flowmesh.node.devices import Inventory
from flowmesh.node.hardware import collect
from flowmesh.node.nvml import Nvml
from flowmesh.node.power import PowerMeter
from flowmesh.node.slots import Slot


class About(msgspec.Struct, frozen=True, kw_only=True):
    """The node, as its workers tell of it."""

    node_id: str
    started: float
    """Monotonic."""
    started_at: str
    isolation: str
    inventory: Inventory
    power: PowerMeter
    nvml: Nvml


def presence(
    about: About, executor: Executor, slot: Slot[Run], client: redis.Redis, on_missed: Callable[[Slot[Run]], None]
) -> Presence:
    """The worker of one slot."""
    settings, plan = executor.settings, slot.plan
    gpus = tuple(gpu for gpu in about.inventory.gpus if gpu.uuid in plan.gpus)
    identity = Identity(
        worker_id=plan.worker_id,
        pid=os.getpid(),
        started_at=about.started_at,
        cost_per_hour=settings.node.cost_per_hour * plan.share,
        tags=settings.node.tags,
        env=_env(about, executor),
        hardware=collect(
            gpus,
            driver_version=about.inventory.driver_version,
            cuda_version=about.inventory.cuda_version,
            bandwidth_bytes_per_sec=settings.delivery.bandwidth_bytes_per_sec,
            cpus=plan.threads,
        ),
    )
    reporter = metrics.Reporter(
        about.power,
        about.nvml,
        gpus,
        cost_per_hour=identity.cost_per_hour,
        started=about.started,
        cpu_share=plan.threads / sum(each.plan.threads for each in executor.slots.values()),
        watch=executor.devices.watch(slot) if gpus else None,
    )
    return Presence(
        client,
        identity,
        interval_s=settings.redis.heartbeat_interval_s,
        metrics=reporter.heartbeat,
        power=reporter.power,
        farewell=reporter.farewell,
        on_left_over=lambda: on_missed(slot),
    )


def _env(about: About, executor: Executor) -> dict[str, Any]:
    settings = executor.settings
    return {
        "RESULTS_DIR": str(executor.layout.results_dir),
        "TASK_TOPIC": settings.redis.task_topic,
        "HEARTBEAT_INTERVAL_SEC": settings.redis.heartbeat_interval_s,
        "ENABLE_ELASTIC_SCALING": settings.node.elastic_scaling,
        "task_types": sorted(executor.catalogue.offered),
        "isolation": about.isolation,
        "version": __version__,
    }
