"""What each worker reports about itself: id, hardware, settings, and the metrics of its heartbeats."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec

from flowmesh import installed
from flowmesh.bus.connection import redis
from flowmesh.bus.presence import Identity, Presence
from flowmesh.execution.executor import Executor
from flowmesh.execution.run import Run
from flowmesh.node import metrics
from flowmesh.node.devices import Inventory
from flowmesh.node.hardware import collect
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.power import PowerMeter
from flowmesh.node.slots import Slot


class NodeDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What the workers of a node have in common."""

    node_id: str
    owner: str
    """Of the registrations; see startup.identity."""
    started: float
    """Monotonic."""
    started_at: str
    isolation: str
    inventory: Inventory
    power: PowerMeter
    nvml: Nvml


def presence(
    node: NodeDescription,
    executor: Executor,
    slot: Slot[Run],
    client: redis.Redis,
    *,
    on_missed: Callable[[Slot[Run]], None],
    on_rival: Callable[[Slot[Run], str], None],
    on_copied: Callable[[], str],
) -> Presence:
    """The registration of one slot's worker."""
    settings, plan = executor.settings, slot.plan
    gpus = tuple(gpu for gpu in node.inventory.gpus if gpu.uuid in plan.gpus)
    identity = Identity(
        worker_id=plan.worker_id,
        pid=os.getpid(),
        started_at=node.started_at,
        cost_per_hour=settings.node.cost_per_hour * plan.share,
        tags=settings.node.tags,
        env=described_env(node, executor),
        owner=node.owner,
        hardware=collect(
            gpus,
            driver_version=node.inventory.driver_version,
            cuda_version=node.inventory.cuda_version,
            bandwidth_bytes_per_sec=settings.delivery.bandwidth_bytes_per_sec,
            cpus=plan.threads,
        ),
    )
    reporter = metrics.Reporter(
        node.power,
        node.nvml,
        gpus,
        cost_per_hour=identity.cost_per_hour,
        started=node.started,
        cpu_share=plan.threads / sum(each.plan.threads for each in executor.slots.values()),
        observer=executor.heartbeat_observer(slot),
    )
    return Presence(
        client,
        identity,
        interval_s=settings.redis.heartbeat_interval_s,
        metrics=reporter.heartbeat,
        power=reporter.power,
        farewell=reporter.farewell,
        on_left_over=lambda: on_missed(slot),
        on_rival=lambda reason: on_rival(slot, reason),
        on_copied=on_copied,
        elastic=settings.node.elastic_scaling,
    )


def described_env(node: NodeDescription, executor: Executor) -> dict[str, Any]:
    """`env_json` as it is now: without the task types whose environment does not work."""
    settings = executor.settings
    return {
        "RESULTS_DIR": str(executor.layout.results_dir),
        "TASK_TOPIC": settings.redis.task_topic,
        "HEARTBEAT_INTERVAL_SEC": settings.redis.heartbeat_interval_s,
        "ENABLE_ELASTIC_SCALING": settings.node.elastic_scaling,
        "task_types": executor.offered_types(),
        "isolation": node.isolation,
        "pipelines": settings.queue.pipelines if settings.queue.enabled else 0,
        "node": node.node_id if settings.queue.enabled else "",
        "version": installed.version(),
    }
