"""P2 on real hardware: a killed task's memory comes back, every time, and a fork server never has any."""

from __future__ import annotations

import asyncio
import os

import pytest

from flowmesh.node.devices import GpuInfo, GpuSample
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.release_proof import ReleaseProof
from flowmesh.node.release_state import GpuState
from tests.gpu.conftest import Script, line_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

GIB = 1 << 30
TIMES = 10

HOLD = """
import sys, torch
held = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda").fill_(1)
torch.cuda.synchronize()
print("holding", flush=True)
sys.stdin.read()
"""

# What a fork server does: import, check for CUDA without touching it, stay single-threaded, fork.
SERVE = """
import os, sys
import torch
assert torch.cuda.is_available() and torch.cuda.device_count() == 1
assert not torch.cuda.is_initialized()
print(len(os.listdir("/proc/self/task")), flush=True)
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        a = torch.randn(1024, 1024, device="cuda", dtype=torch.float64)
        close = torch.allclose((a @ a).cpu(), a.cpu() @ a.cpu())
        os._exit(0 if close else 3)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def size_of(free_bytes: int) -> int:
    """20 GB, or what a smaller card can spare."""
    return min(20 * 10**9, int(free_bytes * 0.6))


def test_a_killed_child_gives_20_gb_back_ten_times_in_a_row(gpu: GpuInfo, on_gpu: Script) -> None:
    async def run() -> list[float]:
        nvml = Nvml()
        times_ms = []
        for _ in range(TIMES):
            proof = ReleaseProof(nvml, [gpu.uuid])
            before = (await proof.begin())[gpu.uuid]
            assert isinstance(before, GpuSample)
            size = size_of(gpu.memory_total_bytes - before.used_bytes)
            child = on_gpu(HOLD, str(size))
            assert line_of(child) == "holding"
            looks = await nvml.sample([gpu.uuid])
            proof.observe(looks)
            look = looks[gpu.uuid]
            assert isinstance(look, GpuSample)
            assert look.used_bytes >= before.used_bytes + size
            child.kill()
            child.wait()
            report = await proof.wait_released([child.pid], timeout_s=30)
            assert report.released, str(report)
            assert report.gpus[gpu.uuid].peak_bytes >= before.used_bytes + size
            times_ms.append(report.ms)
        await nvml.close()
        return times_ms

    times_ms = sorted(asyncio.run(run()))
    print(f"release of 20 GB: median {times_ms[TIMES // 2]:.0f} ms, worst {times_ms[-1]:.0f} ms")


def test_who_holds_a_gpu_is_seen_while_it_lives(gpu: GpuInfo, on_gpu: Script) -> None:
    async def run() -> None:
        nvml = Nvml()
        proof = ReleaseProof(nvml, [gpu.uuid])
        await proof.begin()
        child = on_gpu(HOLD, str(GIB))
        assert line_of(child) == "holding"
        report = await proof.wait_released([child.pid], timeout_s=1)
        assert not report.released
        release = report.gpus[gpu.uuid]
        pids = [holder.pid for holder in release.holders]
        if child.pid not in pids:
            # In a container the driver may count processes as the host does, or not tell of them at all.
            assert release.state in {GpuState.FOREIGN, GpuState.LEAKED}
        else:
            assert release.state is GpuState.HELD
            assert all(holder.command for holder in release.holders if holder.pid == child.pid)
        child.kill()
        child.wait()
        assert (await proof.wait_released([child.pid], timeout_s=30)).released
        await nvml.close()

    asyncio.run(run())


def test_a_fork_server_has_no_context_and_its_children_can_use_cuda(gpu: GpuInfo, on_gpu: Script) -> None:
    async def run() -> None:
        nvml = Nvml()
        proof = ReleaseProof(nvml, [gpu.uuid])
        await proof.begin()
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        server = on_gpu(SERVE, PYTORCH_NVML_BASED_CUDA_CHECK="1", **threads)
        assert line_of(server) == "1", "a process that forks must have one thread"
        assert server.stdin is not None
        for _ in range(3):
            server.stdin.write("fork\n")
            server.stdin.flush()
            assert line_of(server) == "0", "the forked child could not use CUDA"
            look = (await nvml.sample([gpu.uuid]))[gpu.uuid]
            assert isinstance(look, GpuSample)
            assert server.pid not in look.pids
        release = await proof.wait_released([server.pid], timeout_s=10)
        assert release.released, f"the server holds memory: {release}"
        await nvml.close()

    asyncio.run(run())


@pytest.mark.skipif(
    os.environ.get("FLOWMESH_TEST_XID") != "1", reason="causes an Xid 31; FLOWMESH_TEST_XID=1 allows it"
)
def test_an_illegal_access_is_an_application_xid(gpu: GpuInfo, on_gpu: Script) -> None:
    from flowmesh.node.health import GpuHealth
    from flowmesh.node.xid import XidVerdict

    trespass = """
import torch
one = torch.zeros(256, device="cuda")
class Far:
    __cuda_array_interface__ = {
        "shape": (1 << 40,), "typestr": "<f4", "data": (one.data_ptr(), False), "version": 3, "strides": None,
    }
far = torch.as_tensor(Far(), device="cuda")
try:
    far[1 << 38 : (1 << 38) + 1024].add_(1)
    torch.cuda.synchronize()
except RuntimeError as error:
    print("fault" if "illegal memory access" in str(error) else error, flush=True)
"""

    async def run() -> None:
        nvml = Nvml()
        health = GpuHealth([gpu])
        await nvml.inventory()
        await nvml.events()
        assert line_of(on_gpu(trespass)) == "fault"
        for _ in range(50):
            findings = health.judge(await nvml.events())
            if findings:
                break
            await asyncio.sleep(0.1)
        else:
            pytest.skip("the driver delivers no Xid events here")
        assert findings[0].verdict is XidVerdict.APPLICATION
        assert findings[0].uuids == (gpu.uuid,)
        assert health.condemned([gpu.uuid]) == {}
        await nvml.close()

    asyncio.run(run())
