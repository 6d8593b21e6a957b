"""NVML's readings on real hardware agree with CUDA's, with themselves, and cost little."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time

import pytest

from flowmesh.node import hardware
from flowmesh.node.devices import GpuInfo, GpuSample
from flowmesh.node.energy import TaskMeter
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.power import PowerMeter
from tests.gpu.conftest import Script, line_of

pytestmark = pytest.mark.gpu

ASK_CUDA = """
import json, torch
p = torch.cuda.get_device_properties(0)
print(json.dumps({"name": p.name, "total": p.total_memory, "uuid": str(getattr(p, "uuid", ""))}))
"""

BURN = """
import sys, threading, torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
print("burning", flush=True)
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
while not stop.is_set():
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
"""


def test_the_inventory_agrees_with_cuda(gpu: GpuInfo, on_gpu: Script) -> None:
    theirs = json.loads(line_of(on_gpu(ASK_CUDA)))
    assert theirs["name"] == gpu.name
    # CUDA leaves out what the driver keeps for itself and for ECC.
    assert 0.9 * gpu.memory_total_bytes <= theirs["total"] <= gpu.memory_total_bytes
    if theirs["uuid"]:
        assert theirs["uuid"].removeprefix("GPU-") in gpu.uuid


def test_hardware_json_names_the_driver(gpus: tuple[GpuInfo, ...]) -> None:
    async def run() -> None:
        nvml = Nvml()
        found = await nvml.inventory()
        await nvml.close()
        assert found.unusable == ()
        told = hardware.collect(gpus, driver_version=found.driver_version, cuda_version=found.cuda_version)
        assert told.gpu.driver_version
        assert told.gpu.cuda_version
        assert int(told.gpu.cuda_version.split(".")[0]) >= 11
        assert [each.uuid for each in told.gpu.gpus] == [each.uuid for each in gpus]

    asyncio.run(run())


@pytest.mark.slow
def test_the_energy_counter_agrees_with_the_integral_of_power(gpu: GpuInfo, on_gpu: Script) -> None:
    """15 %: the power reading is an average over up to a second, and the counter's own steps are 100 ms."""

    async def run() -> None:
        nvml = Nvml()
        child = on_gpu(BURN)
        assert line_of(child) == "burning"
        await asyncio.sleep(2)  # the driver averages power over up to a second: none of that from before the load
        meter = PowerMeter()
        samples: list[tuple[float, GpuSample]] = []

        async def look() -> None:
            looks = await nvml.sample([gpu.uuid])
            sample = looks[gpu.uuid]
            assert isinstance(sample, GpuSample)
            meter.observe(looks)
            samples.append((time.monotonic(), sample))

        await look()
        task = TaskMeter([gpu], meter.totals())
        until = time.monotonic() + 10
        while time.monotonic() < until:
            await asyncio.sleep(0.1)
            await look()
            task.observe({gpu.uuid: samples[-1][1]})
        child.kill()
        first, last = samples[0][1], samples[-1][1]
        if first.energy_mj is None or last.energy_mj is None or first.power_w is None:
            pytest.skip("this GPU has no energy counter or no power reading")
        counted_j = (last.energy_mj - first.energy_mj) / 1000
        integral_j = sum(
            ((before.power_w or 0) + (after.power_w or 0)) / 2 * (at_s - before_s)
            for (before_s, before), (at_s, after) in itertools.pairwise(samples)
        )
        print(f"counter {counted_j:.0f} J, integral {integral_j:.0f} J, ratio {integral_j / counted_j:.3f}")
        assert integral_j == pytest.approx(counted_j, rel=0.15)
        used = task.finish(meter.totals(), runtime_s=10, cost_per_hour=1.0)
        if gpu.mig is None:
            assert used.energy.gpu_joules == pytest.approx(counted_j, rel=0.01)
            assert (used.resources.gpus[gpu.uuid].utilization_peak_percent or 0) > 50
        await nvml.close()

    asyncio.run(run())


def test_a_round_of_samples_is_cheap(gpus: tuple[GpuInfo, ...]) -> None:
    async def run() -> None:
        nvml = Nvml()
        uuids = [each.uuid for each in gpus]
        await nvml.sample(uuids)
        rounds_ms = {}
        for memory_only in (False, True):
            spent_ms = []
            for _ in range(50):
                started_s = time.perf_counter()
                looks = await nvml.sample(uuids, memory_only=memory_only)
                spent_ms.append((time.perf_counter() - started_s) * 1000)
                assert all(isinstance(look, GpuSample) for look in looks.values())
            rounds_ms["memory" if memory_only else "full"] = statistics.median(spent_ms)
        print(f"a round over {len(uuids)} GPUs: {rounds_ms}")
        await nvml.close()

    asyncio.run(run())
