"""The GPU part of `flowmesh doctor`: the driver, each GPU, and the slots that the settings make of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from flowmesh.cli.findings import Finding, Level
from flowmesh.cli.render import gib
from flowmesh.errors import ConfigError, DeviceError
from flowmesh.node import slots
from flowmesh.node.devices import GpuInfo, GpuReading, GpuSample, Inventory, choose_gpus
from flowmesh.node.gpu_holders import name_holders
from flowmesh.node.hardware import logical_cores
from flowmesh.node.nvml.binding import LIBRARY
from flowmesh.node.nvml.client import Nvml
from flowmesh.settings.schema import Settings

PCI = Path("/sys/bus/pci/devices")
INIT_TIMEOUT_S = 30.0
_NVIDIA, _DISPLAY = "0x10de", "0x03"
"""PCI vendor and class."""


class Seen(msgspec.Struct, frozen=True):
    """What the driver says."""

    inventory: Inventory
    readings: dict[str, GpuReading]


def look() -> Seen | DeviceError:
    """Ask the driver, or why it does not answer."""
    try:
        return Seen(*asyncio.run(_ask()))
    except DeviceError as error:
        return error


def gpus(
    settings: Settings, environ: Mapping[str, str], seen: Seen | DeviceError, *, node_runs: bool
) -> Iterator[Finding]:
    """The driver, each GPU, and the slots that the settings make of them."""
    if isinstance(seen, DeviceError):
        yield Finding("GPUs", Level.BROKEN, str(seen), "run nvidia-smi; if it fails too, reboot")
        return
    inventory, readings = seen.inventory, seen.readings
    if inventory.driver_version is None:
        yield _no_driver()
    else:
        cuda = f", CUDA up to {inventory.cuda_version}" if inventory.cuda_version else ""
        yield Finding("GPUs", Level.OK, f"driver {inventory.driver_version}{cuda}")
    for problem in inventory.unusable if inventory.driver_version is not None else ():
        yield _unusable(problem)
    for gpu in inventory.gpus:
        yield from _gpu(gpu, readings.get(gpu.uuid), settings, node_runs=node_runs)
    try:
        down = inventory.some_are_down
        visible, missing = choose_gpus(inventory.gpus, environ.get("CUDA_VISIBLE_DEVICES"), some_are_down=down)
        cpus = sorted(os.sched_getaffinity(0))
        plans = slots.plan(settings, "", visible, cpus, logical_cores(), some_are_down=down, missing=missing)
    except ConfigError as error:
        yield Finding("slots", Level.BROKEN, str(error), "correct that setting")
        return
    left = {gpu.uuid: gpu for gpu in visible}
    for plan in plans:
        if plan.missing and inventory.driver_version is not None:
            what = f"{plan.name}: GPU {', '.join(plan.missing)} is not there; its worker is DEGRADED until it is"
            yield Finding("slots", Level.BROKEN, what, "repair the GPUs listed above, or name others")
        else:
            yield Finding("slots", Level.OK, _slot(plan, left))


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


async def _ask() -> tuple[Inventory, dict[str, GpuReading]]:
    nvml = Nvml(init_deadline_s=INIT_TIMEOUT_S)
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
        return Finding("GPUs", Level.OK, "none: CPU-only node")
    what = "1 NVIDIA GPU" if cards == 1 else f"{cards} NVIDIA GPUs"
    text = f"{what} on the PCI bus, but the driver library {LIBRARY} is missing"
    return Finding("GPUs", Level.BROKEN, text, "install the driver; in a container: docker run --gpus all")


def _gpu(gpu: GpuInfo, look: GpuReading | None, settings: Settings, *, node_runs: bool) -> Iterator[Finding]:
    name = f"GPU {gpu.index} {gpu.name} ({gpu.uuid})"
    if not isinstance(look, GpuSample):
        why = look.why if look is not None else "no answer"
        yield Finding("GPUs", Level.BROKEN, f"{name}: {why}", f"sudo nvidia-smi --gpu-reset -i {gpu.index}; or reboot")
        return
    heat = "" if look.temperature_c is None else f", {look.temperature_c} °C"
    yield Finding("GPUs", Level.OK, f"{name}: {gib(look.used_bytes)} of {gib(gpu.memory_total_bytes)} in use{heat}")
    if look.throttled:
        at_work = look.throttled == ("sw_power_cap",)  # normal for a busy GPU at its rated power
        yield Finding(
            "GPUs",
            Level.NOTE if at_work else Level.WARN,
            f"GPU {gpu.index} is throttled: {', '.join(look.throttled)}",
            "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER",
        )
    if look.processes and not node_runs:
        holders = ", ".join(map(str, asyncio.run(name_holders(look.processes))))
        level = Level.NOTE if settings.gpu.allow_foreign else Level.WARN
        text = f"GPU {gpu.index} is used by {holders}: its slot would accept no tasks"
        if level is Level.NOTE:
            text = f"GPU {gpu.index} is used by {holders} (gpu.allow_foreign)"
        remedy = "" if level is Level.NOTE else "stop that process, or set gpu.allow_foreign = true"
        yield Finding("GPUs", level, text, remedy)
