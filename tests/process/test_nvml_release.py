"""The proof of release with a stub NVML: memory freed late, holders, foreign processes, lost and hung GPUs."""

from __future__ import annotations

import asyncio
import getpass
import os
import signal
import subprocess
import sys

import msgspec
import pytest

from flowmesh.errors import DeviceError
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.release_proof import ReleaseProof
from flowmesh.node.release_state import Baseline, GpuState
from tests.kit.nvml_stub.harness import Stub, run_with_stub

MIB = 1 << 20
GIB = 1 << 30
ONE_GPU = f"""
    gpu GPU-aaaa {80 * GIB} NVIDIA H100
    set GPU-aaaa used {500 * MIB}
"""


async def started(stub: Stub, *uuids: str, deadline_s: float = 5.0) -> ReleaseProof:
    """A proof whose task has started and has a sample of 20 GiB on the first GPU."""
    nvml = Nvml(deadline_s=deadline_s)
    await nvml.inventory()
    proof = ReleaseProof(nvml, uuids or ("GPU-aaaa",))
    await proof.begin()
    stub.change("set GPU-aaaa used", f"set GPU-aaaa used {20 * GIB}")
    proof.observe(await nvml.sample(["GPU-aaaa"]))
    return proof


def test_memory_that_comes_back_late_is_waited_for() -> None:
    async def body(stub: Stub) -> None:
        proof = await started(stub)
        stub.add(f"memory GPU-aaaa {20 * GIB} {21 * GIB} {9 * GIB} {501 * MIB}")
        report = await proof.wait_released([4242], timeout_s=30)
        assert report.released
        gpu = report.gpus["GPU-aaaa"]
        assert (gpu.state, gpu.before_bytes, gpu.after_bytes) == (GpuState.RELEASED, 500 * MIB, 501 * MIB)
        assert gpu.peak_bytes == 21 * GIB
        assert gpu.holders == ()
        assert report.ms > 0

    run_with_stub(ONE_GPU, body)


def test_what_holds_a_gpu_is_named_until_it_goes() -> None:
    async def body(stub: Stub) -> None:
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        proof = await started(stub)
        stub.add(f"process GPU-aaaa {sleeper.pid} {20 * GIB}")
        report = await proof.wait_released([sleeper.pid], timeout_s=0.1)
        assert not report.released
        gpu = report.gpus["GPU-aaaa"]
        assert gpu.state is GpuState.HELD
        (holder,) = gpu.holders
        assert (holder.pid, holder.user, holder.ours, holder.used_bytes) == (
            sleeper.pid,
            getpass.getuser(),
            True,
            20 * GIB,
        )
        assert "time.sleep(60)" in str(holder.command)
        assert f"pid {sleeper.pid}" in str(report)
        sleeper.kill()
        sleeper.wait()
        stub.remove("process")
        stub.change("set GPU-aaaa used", f"set GPU-aaaa used {500 * MIB}")
        assert (await proof.wait_released([sleeper.pid], timeout_s=30)).released

    run_with_stub(ONE_GPU, body)


def test_bytes_without_a_process_are_a_leak() -> None:
    async def body(stub: Stub) -> None:
        report = await (await started(stub)).wait_released([], timeout_s=0.1)
        assert report.gpus["GPU-aaaa"].state is GpuState.LEAKED
        assert str(report) == "GPU-aaaa has 19980 MiB more in use than before the task"

    run_with_stub(ONE_GPU, body)


def test_a_stranger_is_told_apart_from_who_was_there_before() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml()
        proof = ReleaseProof(nvml, ["GPU-aaaa"], allow_foreign=True)
        strict = ReleaseProof(nvml, ["GPU-aaaa"])
        await proof.begin()
        await strict.begin()
        stub.add(f"process GPU-aaaa 4194304 {GIB}")
        stub.change("set GPU-aaaa used", f"set GPU-aaaa used {500 * MIB + GIB}")
        assert (await proof.wait_released([], timeout_s=30)).released
        report = await strict.wait_released([], timeout_s=0.05)
        gpu = report.gpus["GPU-aaaa"]
        assert gpu.state is GpuState.FOREIGN
        assert [holder.pid for holder in gpu.holders] == [4194304]
        assert "not in /proc: in another PID namespace?" in str(report)

    run_with_stub(ONE_GPU + f"process GPU-aaaa 1 {100 * MIB}\n", body)


def test_a_gpu_that_is_lost_is_reported_and_the_other_proven() -> None:
    async def body(stub: Stub) -> None:
        proof = await started(stub, "GPU-aaaa", "GPU-bbbb")
        stub.add("fail memory GPU-aaaa 15", "fail memory_v1 GPU-aaaa 15")
        report = await proof.wait_released([], timeout_s=0.05)
        states = {uuid: gpu.state for uuid, gpu in report.gpus.items()}
        assert states == {"GPU-aaaa": GpuState.LOST, "GPU-bbbb": GpuState.RELEASED}
        assert report.gpus["GPU-aaaa"].after_bytes is None
        assert str(report) == "GPU-aaaa does not answer: GPU is lost"

    run_with_stub(ONE_GPU + f"gpu GPU-bbbb {80 * GIB} NVIDIA H100\n", body)


def test_a_driver_that_hangs_ends_the_wait_and_not_the_loop() -> None:
    async def body(stub: Stub) -> None:
        proof = await started(stub, deadline_s=0.1)
        stub.add("hang memory *")
        report = await proof.wait_released([], timeout_s=0.3)
        assert report.gpus["GPU-aaaa"].state is GpuState.LOST
        assert "NVML has not answered" in str(report)
        stub.remove("hang")
        stub.change("set GPU-aaaa used", f"set GPU-aaaa used {500 * MIB}")
        assert (await proof.wait_released([], timeout_s=30)).released

    run_with_stub(ONE_GPU, body)


def test_a_task_does_not_start_on_a_gpu_that_does_not_answer() -> None:
    async def body(stub: Stub) -> None:
        with pytest.raises(DeviceError, match="GPU-aaaa does not answer: GPU is lost"):
            await ReleaseProof(Nvml(), ["GPU-aaaa"]).begin()

    run_with_stub(ONE_GPU + "fail memory * 15\nfail memory_v1 * 15\n", body)


def test_a_task_without_gpus_is_proven_at_once() -> None:
    async def body(stub: Stub) -> None:
        proof = ReleaseProof(Nvml(), [])
        await proof.begin()
        report = await proof.wait_released([], timeout_s=1)
        assert report.released
        assert report.gpus == {}

    run_with_stub(ONE_GPU, body)


def test_a_baseline_outlives_the_supervisor_that_took_it() -> None:
    async def body(stub: Stub) -> None:
        proof = await started(stub)
        kept = msgspec.json.encode(proof.baselines)
        stub.change("set GPU-aaaa used", f"set GPU-aaaa used {500 * MIB}")
        heir = ReleaseProof(Nvml(), ["GPU-aaaa"])
        heir.resume(msgspec.json.decode(kept, type=dict[str, Baseline]))
        report = await heir.wait_released([], timeout_s=30)
        assert report.released
        assert report.gpus["GPU-aaaa"].before_bytes == 500 * MIB

    run_with_stub(ONE_GPU, body)


def test_the_wait_can_be_cancelled() -> None:
    async def body(stub: Stub) -> None:
        proof = await started(stub)
        waiting = asyncio.create_task(proof.wait_released([], timeout_s=60))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run_with_stub(ONE_GPU, body)


def test_the_harness_tells_a_failure_and_a_crash_of_its_child() -> None:
    async def fails(stub: Stub) -> None:
        raise ValueError("the reason")

    async def dies(stub: Stub) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError, match="ValueError: the reason"):
        run_with_stub(ONE_GPU, fails)
    with pytest.raises(AssertionError, match="killed or crashed"):
        run_with_stub(ONE_GPU, dies)
