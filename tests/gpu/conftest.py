"""A real GPU, or a skip that says why there is none. CUDA itself runs in children only: pytest never has a context."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest

from flowmesh.errors import DeviceError
from flowmesh.node.devices import GpuInfo, GpuSample, visible_gpus
from flowmesh.node.nvml.client import Nvml
from tests.kit.paths import ROOT

Script = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="session")
def gpus() -> tuple[GpuInfo, ...]:
    """The machine's GPUs that CUDA_VISIBLE_DEVICES leaves."""

    async def ask() -> tuple[GpuInfo, ...]:
        nvml = Nvml()
        try:
            return visible_gpus((await nvml.inventory()).gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
        finally:
            await nvml.close()

    try:
        found = asyncio.run(ask())
    except DeviceError as error:
        pytest.skip(f"NVML does not work here: {error}")
    if not found:
        pytest.skip("NVML finds no GPU here")
    return found


@pytest.fixture(scope="session")
def gpu(gpus: tuple[GpuInfo, ...]) -> GpuInfo:
    """The GPU with the most free memory, where torch can use it."""
    if find_spec("torch") is None:
        pytest.skip("torch is not installed")
    ask = "import torch; print(torch.version.cuda is not None and torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, check=False)
    if done.stdout.strip() != "True":
        pytest.skip(f"torch cannot use CUDA here: {done.stderr.strip()[-200:] or 'a CPU build, or no device'}")

    async def free_bytes() -> dict[str, int]:
        nvml = Nvml()
        looks = await nvml.sample([each.uuid for each in gpus], memory_only=True)
        await nvml.close()
        return {
            each.uuid: each.memory_total_bytes - look.used_bytes
            for each in gpus
            if isinstance(look := looks[each.uuid], GpuSample)
        }

    free = asyncio.run(free_bytes())
    if not free:
        pytest.skip("no GPU answers NVML")
    return max((each for each in gpus if each.uuid in free), key=lambda each: free[each.uuid])


@pytest.fixture
def on_gpu(gpu: GpuInfo) -> Iterator[Script]:
    """Starts a Python script that sees only `gpu`; whatever still runs at the end is killed."""
    running: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        child = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu.uuid, "PYTHONPATH": paths, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(child)
        return child

    yield start
    for child in running:
        child.kill()
        child.communicate()


def line_of(child: subprocess.Popen[str]) -> str:
    """The child's next line; its end is a failure."""
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line, f"the child ended with {child.wait()} before it said a word"
    return line.strip()
