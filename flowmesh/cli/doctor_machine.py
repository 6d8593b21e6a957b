"""The host part of `flowmesh doctor`: process isolation, resource limits, disk space, tools."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from flowmesh import installed
from flowmesh.cli.embedded import find_server
from flowmesh.cli.findings import Finding, Level
from flowmesh.cli.render import gib
from flowmesh.errors import UnavailableError
from flowmesh.node.rapl import Rapl
from flowmesh.processes import cgroup
from flowmesh.settings import paths
from flowmesh.settings.schema import Settings
from flowmesh.settings.types import Isolation
from flowmesh.startup.trust import SetUp, trust

LOW_BYTES, FEW_BYTES = 1 << 30, 10 << 30
"""Free disk space below which tasks fail, and below which a warning is due."""
SMALL_SHM_BYTES = 1 << 30
FEW_FILES, FEW_PROCESSES = 4096, 4096
WANTED_FILES = 131072


def isolation(settings: Settings) -> Iterator[Finding]:
    if settings.processes.isolation is Isolation.SUBREAPER:
        yield Finding("isolation", Level.OK, "subreaper, as set by processes.isolation")
        return
    name = f"doctor-{os.getpid()}"
    base = cgroup.prepare(name)
    if base is None:
        if (own := cgroup.own_cgroup()) is not None:
            with contextlib.suppress(OSError):
                (own / f"flowmesh-{name}").rmdir()
        required = settings.processes.isolation is Isolation.CGROUP
        text = "no writable cgroup v2: task processes are tracked by subreaper and session only"
        remedy = "under systemd: Delegate=yes (as in conf/flowmesh-supervisor.service)"
        yield Finding("isolation", Level.BROKEN if required else Level.NOTE, text, remedy)
        return
    found = sorted(cgroup.controllers(base))
    base.rmdir()
    yield Finding("isolation", Level.OK, f"cgroup v2, controllers: {', '.join(found) or 'none'}")


def separation(settings: Settings) -> Finding:
    """What separates tasks from the node."""
    found = trust(settings)
    level = {SetUp.TASK_USER: Level.OK, SetUp.SHARED_USER: Level.NOTE, SetUp.ROOT: Level.WARN}[found.set_up]
    return Finding("trust", level, found.text, found.remedy)


def limits(*, has_gpus: bool) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _below(soft, FEW_FILES):
        possible = hard if _below(hard, WANTED_FILES) else WANTED_FILES
        remedy = f"ulimit -n {possible} (systemd: LimitNOFILE={WANTED_FILES})"
        yield Finding("limits", Level.WARN, f"open files: {soft}", remedy)
    else:
        yield Finding("limits", Level.OK, f"open files: {_number(soft)}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if has_gpus and locked != resource.RLIM_INFINITY:
        text = f"locked memory: {_size(locked)}; pinned host buffers and RDMA may need more"
        yield Finding("limits", Level.WARN, text, "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity)")
    else:
        yield Finding("limits", Level.OK, f"locked memory: {'no limit' if locked < 0 else _size(locked)}")
    yield _processes()
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    if shm is None or shm.total < SMALL_SHM_BYTES:
        size = "missing" if shm is None else f"{shm.total >> 20} MiB"
        remedy = "sudo mount -o remount,size=50% /dev/shm; in a container: docker run --shm-size=16g"
        yield Finding("limits", Level.WARN, f"/dev/shm: {size}; data loaders and NCCL need more", remedy)


def _processes() -> Finding:
    bounds = {}
    if os.geteuid() != 0:  # root has no such limit
        bounds["ulimit -u"] = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    folder = cgroup.own_cgroup()
    while folder is not None and (folder / "cgroup.controllers").exists():
        with contextlib.suppress(OSError, ValueError):  # no such controller here, or "max"
            bounds[str(folder / "pids.max")] = int((folder / "pids.max").read_text())
        folder = folder.parent
    known = {where: bound for where, bound in bounds.items() if bound >= 0}
    if not known:
        return Finding("limits", Level.OK, "processes: no limit")
    where = min(known, key=lambda bound_at: known[bound_at])
    if known[where] < FEW_PROCESSES:
        remedy = f"raise {where} (systemd: TasksMax=infinity; docker run --pids-limit=-1)"
        return Finding("limits", Level.WARN, f"processes: {known[where]}", remedy)
    return Finding("limits", Level.OK, f"processes: {known[where]}")


def _below(limit: int, required: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < required


def _size(size_bytes: int) -> str:
    return gib(size_bytes) if size_bytes >= 1 << 30 else f"{size_bytes / (1 << 20):.0f} MiB"


def _number(limit: int) -> str:
    return "no limit" if limit == resource.RLIM_INFINITY else str(limit)


def disk(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    for key, folder in (
        ("results.dir", paths.results_dir(settings)),
        ("node.state_dir", paths.state_dir(settings, environ)),
    ):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            remedy = f"sudo install -d -o {_user()} {folder}; or set {key} to another folder"
            yield Finding("disk", Level.BROKEN, f"{key} {folder}: not writable for this user", remedy)
            continue
        free = shutil.disk_usage(there).free
        level = Level.BROKEN if free < LOW_BYTES else Level.WARN if free < FEW_BYTES else Level.OK
        remedy = "" if level is Level.OK else f"du -xh {folder} | sort -h | tail; or set {key} to another disk"
        new = "" if there == folder else " (created at start)"
        yield Finding("disk", level, f"{key} {folder}{new}: {gib(free)} free", remedy)


def tools(settings: Settings) -> Iterator[Finding]:
    pigz = shutil.which(settings.archive.pigz_bin)
    if not settings.archive.use_pigz:
        yield Finding("tools", Level.OK, "pigz: not used (archive.use_pigz)")
    elif pigz is None:
        text = f"{settings.archive.pigz_bin} not found: archives are compressed on one CPU"
        yield Finding("tools", Level.NOTE, text, "sudo apt-get install pigz")
    else:
        yield Finding("tools", Level.OK, f"pigz: {pigz}")
    try:
        yield Finding("tools", Level.OK, f"redis-server: {find_server()}")
    except UnavailableError:
        text = "redis-server not found: only `flowmesh run` needs it"
        yield Finding("tools", Level.NOTE, text, installed.install_command("embedded"))
    if (why := Rapl().unavailable) is not None:
        yield Finding("tools", Level.NOTE, f"CPU energy is not measured: {why}")


def _user() -> str:
    return os.environ.get("USER") or str(os.geteuid())
