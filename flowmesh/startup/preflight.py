"""What the start of a node refuses: looked at by the start, and by a running node before it starts anew in its place.

May make folders and files that the start would make too; nothing that a running node has is changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from flowmesh.errors import ConfigError
from flowmesh.execution.layout import Owner
from flowmesh.node.devices import GpuInfo, Inventory, visible_gpus
from flowmesh.node.hardware import logical_cores
from flowmesh.node.slots import SlotPlan
from flowmesh.node.slots import plan as plan_slots
from flowmesh.processes import cgroup
from flowmesh.settings_paths import log_file, results_dir, state_dir
from flowmesh.settings_schema import Settings
from flowmesh.settings_types import Isolation
from flowmesh.startup import environments
from flowmesh.startup import state_dir as folders


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """What the settings come to on this machine."""

    gpus: tuple[GpuInfo, ...]
    """Those that the node may offer."""
    slots: tuple[SlotPlan, ...]
    cgroup: Path | None
    """Where tasks get leaves of their own; None: the system does not let us, or the settings do not want it."""


def check(settings: Settings, environ: Mapping[str, str]) -> None:
    """What shows without a look at the devices, and before the node's own folder is held.

    Raises:
        ConfigError: names the setting that the start would refuse, and why.
    """
    if settings.redis.url is None:
        raise ConfigError("redis.url: missing; set REDIS_URL, or redis.url in the node's file")
    folders.check_sockets(state_dir(settings, environ), settings.environments)
    environments.task_types(settings)
    owner(settings)
    folders.make_results_dir(results_dir(settings))
    if (path := log_file(settings)) is not None:
        folders.make_log_file(path)


def owner(settings: Settings) -> Owner | None:
    """Who tasks run as, where that is not the node's own user.

    Raises:
        ConfigError: there is no such user, or we may not become it.
    """
    return None if settings.processes.task_user is None else Owner.named(settings.processes.task_user)


def fit(
    settings: Settings, environ: Mapping[str, str], inventory: Inventory, *, node_id: str, worker_id: str
) -> Fitted:
    """Lay the settings over what the machine has.

    Raises:
        ConfigError: they ask for what it does not have.
        DeviceError: none of the GPUs that they name works now.
    """
    down = inventory.some_are_down
    gpus = visible_gpus(inventory.gpus, environ.get("CUDA_VISIBLE_DEVICES"), some_are_down=down)
    cpus = sorted(os.sched_getaffinity(0))
    slots = plan_slots(settings, worker_id, gpus, cpus, logical_cores(), some_are_down=down)
    base = cgroup.prepare(node_id) if settings.processes.isolation is not Isolation.SUBREAPER else None
    _check_limits(settings, base)
    return Fitted(gpus=gpus, slots=slots, cgroup=base)


def _check_limits(settings: Settings, base: Path | None) -> None:
    wants = settings.processes
    if wants.isolation is Isolation.CGROUP and base is None:
        raise ConfigError(
            "processes.isolation: 'cgroup' needs a cgroup v2 hierarchy that this user may write "
            "(under systemd: Delegate=yes); 'auto' takes what there is"
        )
    there = cgroup.controllers(base) if base is not None else set()
    for key, controller in (("task_memory_max_bytes", "memory"), ("task_pids_max", "pids")):
        if getattr(wants, key) is not None and controller not in there:
            raise ConfigError(
                f"processes.{key}: this system gives us no cgroup v2 {controller!r} controller "
                "(under systemd 254 or newer: Delegate=yes and DelegateSubgroup=supervisor); leave the setting out"
            )
