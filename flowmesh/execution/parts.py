"""Makes the parts of the executor and connects them; each gets what it needs, and none gets the executor."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec

from flowmesh.execution.conditions import Conditions
from flowmesh.execution.delivery.deliveries import Deliveries
from flowmesh.execution.delivery.delivery_children import DeliveryChildren
from flowmesh.execution.delivery.gateway_process import GatewayProcess
from flowmesh.execution.delivery.jobs import Jobs
from flowmesh.execution.delivery.redelivery import Redeliveries
from flowmesh.execution.gpu.assembly import make_monitor
from flowmesh.execution.gpu.canary import Canaries
from flowmesh.execution.gpu.monitor import GpuMonitor
from flowmesh.execution.housekeeping.cleanup import Cleanup
from flowmesh.execution.housekeeping.page_process import PageProcess
from flowmesh.execution.launch.ahead import Ahead
from flowmesh.execution.launch.child_pipe import ChildPipes
from flowmesh.execution.launch.environment_conditions import EnvironmentConditions
from flowmesh.execution.launch.launcher import Launcher
from flowmesh.execution.launch.node_folders import NodeFolders
from flowmesh.execution.launch.served_models import ServedModels
from flowmesh.execution.launch.task_children import TaskChildren
from flowmesh.execution.layout import Layout
from flowmesh.execution.near_disk import NearDisk
from flowmesh.execution.observer import Observers
from flowmesh.execution.ports import Ports
from flowmesh.execution.run import Run
from flowmesh.execution.run_table import RunTable
from flowmesh.execution.timers import Timers
from flowmesh.node.devices import GpuInfo
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.power import PowerMeter
from flowmesh.node.slots import Slot
from flowmesh.processes.helper import Helpers
from flowmesh.processes.server_pool import ServerPool
from flowmesh.settings.schema import Settings
from flowmesh.tasks.catalogue import DELIVERY, Catalogue
from flowmesh.tasks.journal import Journal


class Parts(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """See each class."""

    conditions: Conditions
    gpus: GpuMonitor
    environments: EnvironmentConditions
    folders: NodeFolders
    pipes: ChildPipes
    helpers: Helpers
    children: TaskChildren
    served: ServedModels
    launcher: Launcher
    cleanup: Cleanup
    deliveries: Deliveries
    redeliveries: Redeliveries
    gateway: GatewayProcess
    page: PageProcess
    ahead: Ahead


def make_parts(
    *,
    settings: Settings,
    catalogue: Catalogue,
    journal: Journal,
    slots: dict[str, Slot[Run]],
    layout: Layout,
    pool: ServerPool,
    nvml: Nvml,
    power: PowerMeter,
    gpus: Sequence[GpuInfo],
    runs: RunTable,
    observers: Observers,
    timers: Timers,
    ports: Ports,
) -> Parts:
    """
    Args:
        slots: by worker id.
        gpus: those that the slots have.
    """
    conditions = Conditions(
        slots=slots,
        observer=observers,
        post=ports.post,
        pump=ports.pump,
        begin=ports.begin,
        on_over=ports.on_fault_over,
    )
    pipes = ChildPipes(observers.on_endpoint)
    helpers = Helpers(pool)
    monitor = make_monitor(
        settings=settings.gpu,
        layout=layout,
        slots=slots,
        runs=runs,
        nvml=nvml,
        power=power,
        gpus=gpus,
        canaries=Canaries(helpers, layout, catalogue, settings.gpu.canary),
        conditions=conditions,
        post=ports.post,
    )
    wait_s = settings.tasks.node_fault_wait_s
    environments = EnvironmentConditions(
        pool=pool, helpers=helpers, layout=layout, conditions=conditions, wait_s=wait_s
    )
    folders = NodeFolders(
        settings=settings.results, layout=layout, journal=journal, conditions=conditions, wait_s=wait_s
    )
    disk = NearDisk(layout.results_dir, folders.on_one_disk)
    children = TaskChildren(
        runs=runs,
        pool=pool,
        pipes=pipes,
        layout=layout,
        gpus=monitor,
        environments=environments,
        folders=folders,
        timers=timers,
        post=ports.post,
        begin=ports.begin,
    )
    served = ServedModels(runs, settings.tasks.served_model_wait_s)
    launcher = Launcher(
        pool=pool,
        owner=children,
        journal=journal,
        layout=layout,
        folders=folders,
        conditions=conditions,
        environments=environments,
        gpus=monitor,
        served=served,
        disk=disk,
        least_bytes=settings.results.min_free_bytes,
    )
    cleanup = Cleanup(layout)
    jobs, delivery_children = Jobs(settings, layout), DeliveryChildren(settings, layout, helpers)
    gateway = GatewayProcess(settings, layout, helpers, functools.partial(environments.report, DELIVERY))
    ahead = Ahead(slots, helpers, layout, gateway)
    observers.add(ahead)
    return Parts(
        conditions=conditions,
        gpus=monitor,
        environments=environments,
        folders=folders,
        pipes=pipes,
        helpers=helpers,
        children=children,
        served=served,
        launcher=launcher,
        cleanup=cleanup,
        deliveries=Deliveries(delivery_children, jobs, layout, cleanup, environment=environments, disk=disk),
        redeliveries=Redeliveries(delivery_children, jobs, layout, journal, ports.check_idle),
        gateway=gateway,
        page=PageProcess(settings, layout, helpers),
        ahead=ahead,
    )
