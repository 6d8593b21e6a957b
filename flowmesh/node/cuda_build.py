"""Whether an environment's torch fits this machine's driver and GPUs: its CUDA version and architectures."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping

import msgspec

from flowmesh.node.devices import GpuInfo, Inventory

NEEDED_DRIVER = {12: 525, 13: 580}
"""CUDA's major version → the oldest driver for all its minor versions."""
TIMEOUT_S = 120.0
_ASK = """
import importlib.util, json, pathlib, runpy
spec = importlib.util.find_spec("torch")
found = runpy.run_path(str(pathlib.Path(spec.origin).with_name("version.py")))
build = {"version": found["__version__"], "cuda": found.get("cuda"), "archs": []}
if build["cuda"] is not None:
    import torch
    build["archs"] = (getattr(torch._C, "_cuda_getArchFlags", lambda: None)() or "").split()
print("\\n" + json.dumps(build))
"""
"""A build without CUDA is recognised without importing it, which takes seconds."""


class TorchBuild(msgspec.Struct, frozen=True):
    version: str
    cuda: str | None
    """The version that it is built for, such as `13.0`; None: without CUDA."""
    archs: tuple[str, ...] = ()
    """`sm_90` for compiled code, `compute_90` for code that the driver compiles."""


class Mismatch(msgspec.Struct, frozen=True):
    text: str
    remedy: str


def ask(python: str, environ: Mapping[str, str] = os.environ) -> TorchBuild | Mismatch:
    """What an interpreter's torch is built for. Takes seconds: a child, which sees no GPU, imports it."""
    env = {**environ, "CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    remedy = f"run it to see why: {python} -c 'import torch'"
    try:
        done = subprocess.run(
            [python, "-c", _ASK], env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Mismatch(f"torch cannot be imported: {error}", remedy)
    try:
        return msgspec.json.decode(done.stdout.strip().rpartition("\n")[2], type=TorchBuild)
    except msgspec.DecodeError:
        lines = done.stderr.strip().splitlines()
        return Mismatch(f"torch cannot be imported: {lines[-1] if lines else f'exit status {done.returncode}'}", remedy)


def mismatches(build: TorchBuild, inventory: Inventory, python: str) -> list[Mismatch]:
    """Why tasks of this torch would fail on this machine's GPUs, or not use them; empty if they fit.

    Args:
        python: the environment's interpreter, for the remedies.
    """
    install = f"{python} -m pip install --force-reinstall torch"
    if build.cuda is None:
        text = f"torch {build.version} is built without CUDA: its tasks run on the CPU"
        return [Mismatch(text, f"install torch's CUDA build: {install}")]
    found = []
    driver = _numbers(inventory.cuda_version)
    wanted = _numbers(build.cuda)
    if driver and wanted and wanted[0] > driver[0]:
        needed = NEEDED_DRIVER.get(wanted[0])
        text = (
            f"torch {build.version} is built for CUDA {build.cuda}, and driver {inventory.driver_version} supports "
            f"CUDA up to {inventory.cuda_version}: it would see no GPU"
        )
        newer = f"install driver {needed} or newer" if needed else "install a newer driver"
        found.append(Mismatch(text, f"{newer}; or a build of torch for CUDA {driver[0]} from PyTorch's own index"))
    unfit = [gpu for gpu in inventory.gpus if gpu.capability is not None and not runs_on(build.archs, gpu.capability)]
    if build.archs and unfit:
        found.append(Mismatch(_unfit(build, unfit), _leave_out(unfit)))
    return found


def runs_on(archs: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a device of this compute capability.

    Compiled code runs on devices of its own major version and an equal or higher minor one; code for the driver to
    compile runs on every later device. A suffix (`sm_90a`) restricts code to exactly its version.
    """
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if match is None:
            continue
        version = (int(match[2]), int(match[3]))
        if version == capability:
            return True
        if match[4] != "a" and version[0] == capability[0] and version <= capability:
            return True
        if match[1] == "compute" and not match[4] and version <= capability:
            return True
    return False


def _unfit(build: TorchBuild, gpus: list[GpuInfo]) -> str:
    named = ", ".join(f"GPU {gpu.index} {gpu.name} ({_dotted(gpu.capability)})" for gpu in gpus)
    return f"torch {build.version} has no code for {named}: it is built for {' '.join(build.archs)}"


def _leave_out(gpus: list[GpuInfo]) -> str:
    others = "leave them out" if len(gpus) > 1 else "leave it out"
    return (
        "install a build of torch for an older CUDA from PyTorch's own index, which has code for older GPUs; "
        f"or {others} with CUDA_VISIBLE_DEVICES or [[slots]]"
    )


def _dotted(capability: tuple[int, int] | None) -> str:
    return "compute capability " + (".".join(map(str, capability)) if capability is not None else "unknown")


def _numbers(version: str | None) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version or "")))
