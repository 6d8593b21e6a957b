"""Checks that settings can be used on this machine: at start, and in a running node before it restarts itself.

They may create folders and files that the start would create anyway. They change nothing that a running node uses.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from flowmesh.errors import ConfigError
from flowmesh.execution.layout import Owner
from flowmesh.node.devices import GpuInfo, Inventory, choose_gpus
from flowmesh.node.hardware import logical_cores
from flowmesh.node.slots import SlotPlan
from flowmesh.node.slots import plan as plan_slots
from flowmesh.processes import cgroup
from flowmesh.settings.paths import log_file, results_dir, state_dir
from flowmesh.settings.schema import Settings
from flowmesh.settings.types import Isolation
from flowmesh.startup import environments
from flowmesh.startup.state_dir import check_sockets, make_log_file, make_results_dir


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """The settings applied to this machine."""

    gpus: tuple[GpuInfo, ...]
    """The GPUs that the node may offer."""
    slots: tuple[SlotPlan, ...]
    cgroup: Path | None
    """The folder in which children get cgroups; None if the system does not allow that, or the settings exclude it."""


def check(settings: Settings, environ: Mapping[str, str]) -> None:
    """The checks that need neither the GPUs nor the lock on the node's folder.

    Args:
        environ: the node's environment.

    Raises:
        ConfigError: the start would fail; names the setting and the reason.
    """
    if settings.redis.url is None:
        raise ConfigError("redis.url: missing; set REDIS_URL, or redis.url in the node's file")
    check_sockets(state_dir(settings, environ), settings.environments)
    environments.task_types(settings)
    owner(settings)
    make_results_dir(results_dir(settings))
    if (path := log_file(settings)) is not None:
        make_log_file(path)


def owner(settings: Settings) -> Owner | None:
    """The user that tasks run as; None: the node's own user.

    Raises:
        ConfigError: there is no such user, or the node may not become it.
    """
    return None if settings.processes.task_user is None else Owner.named(settings.processes.task_user)


def fit(
    settings: Settings, environ: Mapping[str, str], inventory: Inventory, *, node_id: str, worker_id: str
) -> Fitted:
    """Apply the settings to this machine's GPUs, CPUs and cgroups.

    Args:
        environ: the node's environment.
        inventory: the machine's GPUs.
        node_id: names the node's cgroup.
        worker_id: of the node; slots derive theirs from it.

    Raises:
        ConfigError: the settings request something that the machine does not have.
    """
    down = inventory.some_are_down
    gpus, missing = choose_gpus(inventory.gpus, environ.get("CUDA_VISIBLE_DEVICES"), some_are_down=down)
    cpus = sorted(os.sched_getaffinity(0))
    slots = plan_slots(settings, worker_id, gpus, cpus, logical_cores(), some_are_down=down, missing=missing)
    base = cgroup.prepare(node_id) if settings.processes.isolation is not Isolation.SUBREAPER else None
    _check_limits(settings, base)
    return Fitted(gpus=gpus, slots=slots, cgroup=base)


def _check_limits(settings: Settings, base: Path | None) -> None:
    processes = settings.processes
    if processes.isolation is Isolation.CGROUP and base is None:
        raise ConfigError(
            "processes.isolation: 'cgroup' needs a cgroup v2 hierarchy that this user may write to "
            "(under systemd: Delegate=yes); set it to 'auto' to use cgroups only if there is one"
        )
    available = cgroup.controllers(base) if base is not None else set()
    for key, controller in (("task_memory_max_bytes", "memory"), ("task_pids_max", "pids")):
        if getattr(processes, key) is not None and controller not in available:
            raise ConfigError(
                f"processes.{key}: the node has no cgroup v2 {controller!r} controller; delegate one "
                "(under systemd 254 or newer: Delegate=yes and DelegateSubgroup=supervisor), or remove the setting"
            )
