"""What looking at GPUs costs, and how soon a task's are proven to be back: real ones, or eight of the stub driver's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flowmesh.errors import DeviceError
from flowmesh.node.devices import GpuInfo
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.release_proof import ReleaseProof
from tests.bench.measure import Row, percentile, spread
from tests.kit.gpu_node import GIB, MIB, GpuNode
from tests.kit.nvml_stub.harness import Stub, library
from tests.kit.support import Orchestrator, RedisServer

_GPUS = 8
_HELD_BYTES = 20 * 10**9

# The loop's thread does little: the driver is asked in another one.
_ROUNDS = """
import asyncio, sys, time
from flowmesh.node.nvml.client import Nvml

async def main():
    nvml = Nvml()
    uuids = [gpu.uuid for gpu in (await nvml.inventory()).gpus]
    for brief in (True, False):
        walls, began_cpu = [], 0.0
        for n in range(int(sys.argv[1]) + 5):
            if n == 5:  # what a device does not support is known by now
                walls, began_cpu = [], time.thread_time()
            began = time.perf_counter()
            await nvml.sample(uuids, memory_only=brief)
            walls.append(time.perf_counter() - began)
        print(len(uuids), (time.thread_time() - began_cpu) / len(walls), *walls)

asyncio.run(main())
"""

_HOLD = """
import sys, torch
held = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda").fill_(1)
torch.cuda.synchronize()
print("holding", flush=True)
sys.stdin.read()
"""


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    gpus = asyncio.run(_inventory())
    driver = gpus[0].name if gpus else "stub driver"
    with contextlib.nullcontext(dict(os.environ)) if gpus else _stub() as env:
        command = [sys.executable, "-c", _ROUNDS, str(50 if quick else 300)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    rows = []
    for what, line in zip(("bytes and processes", "everything"), done.stdout.splitlines(), strict=True):
        count, on_loop, *walls = map(float, line.split())
        name = f"a look at {count:.0f} GPUs, {what} ({driver}): p50 / p95 / p99; of it on the event loop's thread"
        rows.append(Row(name, f"{spread(walls)}; {on_loop * 1e6:.0f} µs", number=percentile(walls, 0.5)))
    times = _real_releases(gpus[0], quick=quick) if gpus else _stub_releases(quick=quick)
    what = "SIGKILL of a process with 20 GB" if gpus else f"end of a task on {_GPUS} GPUs that are empty at once"
    released = Row(f"{what} → release proven ({driver}): p50 / p95 / p99", spread(times)) if times else None
    return [*rows, *filter(None, [released])]


async def _inventory() -> tuple[GpuInfo, ...]:
    nvml = Nvml()
    try:
        return (await nvml.inventory()).gpus
    except DeviceError:
        return ()
    finally:
        await nvml.close()


def _script() -> str:
    lines = []
    for n in range(_GPUS):
        lines += [f"gpu GPU-{n:04} {80 * GIB} NVIDIA H100", f"set GPU-{n:04} used {500 * MIB}"]
        lines += [f"set GPU-{n:04} power 100000", f"set GPU-{n:04} energy 1000000"]
    return "\n".join(lines)


@contextlib.contextmanager
def _stub() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script")
        Stub(script, _script())
        yield {**os.environ, "LD_LIBRARY_PATH": str(library().parent), "FLOWMESH_NVML_STUB": str(script)}


def _stub_releases(*, quick: bool) -> list[float]:
    server = RedisServer()
    peer, node = Orchestrator(server), GpuNode(server, _script(), args=["--log-level", "WARNING"])
    try:
        node.start()
        ends = [peer.run("w1", {"taskType": "look"}) for _ in range(10 if quick else 50)]
        return [end["payload"]["resources"]["gpu_release_ms"] / 1000 for end in ends]
    finally:
        node.close()
        peer.close()
        server.close()


def _real_releases(gpu: GpuInfo, *, quick: bool) -> list[float]:
    """None where this interpreter's torch cannot use the GPU."""

    async def once(nvml: Nvml) -> float | None:
        proof = ReleaseProof(nvml, [gpu.uuid])
        await proof.begin()
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu.uuid}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", _HOLD, str(_HELD_BYTES)], env=env, **pipes) as child:  # type: ignore[call-overload]
            holds = child.stdout.readline()
            child.kill()
        if not holds:
            return None
        report = await proof.wait_released([child.pid], timeout_s=30)
        assert report.released, str(report)
        return report.ms / 1000

    async def several() -> list[float]:
        nvml = Nvml()
        try:
            times = [await once(nvml) for _ in range(3 if quick else 10)]
            return [seconds for seconds in times if seconds is not None]
        finally:
            await nvml.close()

    return asyncio.run(several())
