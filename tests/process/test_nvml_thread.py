"""NVML through the real binding with a stub library: inventory, samples, faults, hangs, events."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flowmesh.errors import DeviceError
from flowmesh.node.devices import EventKind, GpuInfo, GpuLost, GpuProcess, GpuSample, MigSlice
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.nvml.session import Session
from tests.kit.nvml_stub.harness import Stub, library, run_with_stub

H100 = "NVIDIA H100 80GB HBM3"
GIB = 1 << 30
TWO_GPUS = f"""
    driver 570.86.15
    cuda 12080
    gpu GPU-aaaa {80 * GIB} NVIDIA H100 80GB HBM3
    gpu GPU-bbbb {80 * GIB} NVIDIA H100 80GB HBM3
    set GPU-aaaa used {4 * GIB}
    set GPU-aaaa reserved {GIB}
    set GPU-aaaa util 87
    set GPU-aaaa power 612345
    set GPU-aaaa energy 9876543210
    set GPU-aaaa temp 61
    set GPU-aaaa throttle 0x44
    process GPU-aaaa 4242 {3 * GIB}
    process GPU-aaaa 4243 {GIB}
    graphics GPU-aaaa 4242 {3 * GIB}
    graphics GPU-aaaa 77 {GIB}
"""


def _nvml_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "nvml"]


def test_the_inventory_names_every_gpu() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml()
        found = await nvml.inventory()
        assert (found.driver_version, found.cuda_version) == ("570.86.15", "12.8")
        assert found.gpus == (
            GpuInfo(index=0, uuid="GPU-aaaa", name=H100, memory_total_bytes=80 * GIB, capability=(9, 0)),
            GpuInfo(index=1, uuid="GPU-bbbb", name=H100, memory_total_bytes=80 * GIB, capability=(9, 0)),
        )
        await nvml.close()
        assert _nvml_threads() == []

    run_with_stub(TWO_GPUS, body)


def test_a_sample_says_all_that_the_device_tells() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml()
        looks = await nvml.sample(["GPU-aaaa", "GPU-bbbb"])
        assert looks["GPU-aaaa"] == GpuSample(
            uuid="GPU-aaaa",
            board="GPU-aaaa",
            used_bytes=4 * GIB,  # as nvidia-smi shows it, without the driver's reserve
            processes=(GpuProcess(4242, 3 * GIB), GpuProcess(4243, GIB)),
            graphics=(GpuProcess(77, GIB),),  # a process that is in both lists is not counted twice
            utilization_percent=87,
            power_w=612.345,
            energy_mj=9876543210,
            temperature_c=61,
            throttled=("sw_power_cap", "hw_thermal"),
        )
        brief = (await nvml.sample(["GPU-aaaa"], memory_only=True))["GPU-aaaa"]
        assert isinstance(brief, GpuSample)
        assert (brief.used_bytes, brief.pids, brief.power_w) == (4 * GIB, {4242, 4243}, None)

    run_with_stub(TWO_GPUS, body)


def test_a_process_whose_bytes_the_driver_does_not_tell() -> None:
    async def body(stub: Stub) -> None:
        look = (await Nvml().sample(["GPU-bbbb"], memory_only=True))["GPU-bbbb"]
        assert isinstance(look, GpuSample)
        assert look.processes == (GpuProcess(1, None), GpuProcess(2, None)), "in a container the driver reports 0"

    not_available = 2**64 - 1
    run_with_stub(f"{TWO_GPUS}\nprocess GPU-bbbb 1 0\nprocess GPU-bbbb 2 {not_available}\n", body)


def test_a_passing_failure_does_not_mix_two_ways_to_count_memory() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml()
        assert isinstance((await nvml.sample(["GPU-aaaa"]))["GPU-aaaa"], GpuLost)
        stub.remove("fail")
        look = (await nvml.sample(["GPU-aaaa"]))["GPU-aaaa"]
        assert isinstance(look, GpuSample)
        assert look.used_bytes == 4 * GIB

    run_with_stub(TWO_GPUS + "fail memory GPU-aaaa 999\n", body)


def test_the_memory_of_an_old_driver_includes_its_reserve() -> None:
    async def body(stub: Stub) -> None:
        look = (await Nvml().sample(["GPU-aaaa"]))["GPU-aaaa"]
        assert isinstance(look, GpuSample)
        assert look.used_bytes == 5 * GIB

    run_with_stub(TWO_GPUS + "fail memory * 13\n", body)


def test_a_call_that_is_not_supported_is_none_and_asked_once() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml()
        for _ in range(2):
            look = (await nvml.sample(["GPU-aaaa"]))["GPU-aaaa"]
            assert isinstance(look, GpuSample)
            assert (look.power_w, look.energy_mj, look.processes, look.temperature_c) == (None, None, None, 61)
            stub.remove("without")  # a second call would succeed now

    run_with_stub(TWO_GPUS + "without power\nwithout energy\nwithout processes\n", body)


def test_a_passing_failure_of_one_reading_is_asked_again() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml()
        look = (await nvml.sample(["GPU-aaaa"]))["GPU-aaaa"]
        assert isinstance(look, GpuSample)
        assert look.power_w is None
        stub.remove("fail")
        look = (await nvml.sample(["GPU-aaaa"]))["GPU-aaaa"]
        assert isinstance(look, GpuSample)
        assert look.power_w == 612.345

    run_with_stub(TWO_GPUS + "fail power GPU-aaaa 999\n", body)


def test_silence_about_processes_does_not_pass_for_an_idle_gpu() -> None:
    async def body(stub: Stub) -> None:
        looks = await Nvml().sample(["GPU-aaaa", "GPU-bbbb"])
        assert isinstance(looks["GPU-aaaa"], GpuLost)
        assert isinstance(looks["GPU-bbbb"], GpuSample)

    run_with_stub(TWO_GPUS + "fail processes GPU-aaaa 999\n", body)


def test_one_gpu_off_the_bus_leaves_the_other_alone() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml()
        await nvml.inventory()
        stub.add("fail memory GPU-aaaa 15", "fail memory_v1 GPU-aaaa 15", "fail handle GPU-aaaa 15")
        looks = await nvml.sample(["GPU-aaaa", "GPU-bbbb"])
        assert looks["GPU-aaaa"] == GpuLost("GPU-aaaa", "GPU is lost")
        assert isinstance(looks["GPU-bbbb"], GpuSample)
        found = await nvml.inventory()
        assert [gpu.uuid for gpu in found.gpus] == ["GPU-bbbb"]
        assert found.unusable == ("GPU 0: GPU is lost",)

    run_with_stub(TWO_GPUS, body)


def test_a_lost_gpu_is_found_again_after_a_new_init() -> None:
    async def body(stub: Stub) -> None:
        now_s = 0.0
        session = Session(clock=lambda: now_s)
        assert isinstance(session.sample(["GPU-aaaa"])["GPU-aaaa"], GpuLost)
        stub.remove("fail")
        assert isinstance(session.sample(["GPU-aaaa"])["GPU-aaaa"], GpuLost), (
            "a new init for every sample costs too much"
        )
        now_s = 31.0
        assert isinstance(session.sample(["GPU-aaaa"])["GPU-aaaa"], GpuSample)

    run_with_stub(TWO_GPUS + "fail handle GPU-aaaa 15\n", body)


def test_a_gpu_that_stays_lost_is_looked_for_less_and_less_often() -> None:
    async def body(stub: Stub) -> None:
        now_s, inits = 0.0, []
        session = Session(clock=lambda: now_s)
        while now_s < 2000:
            session.sample(["GPU-aaaa", "GPU-bbbb"])
            assert session._opened is not None
            if not inits or inits[-1] != session._opened.at_s:
                inits.append(session._opened.at_s)
            now_s += 10
        assert inits == [0, 30, 90, 210, 450, 930, 1890], "during a new init the other GPU cannot be sampled"
        stub.remove("fail")
        now_s = 3000
        assert isinstance(session.sample(["GPU-aaaa"])["GPU-aaaa"], GpuSample)

    run_with_stub(TWO_GPUS + "fail handle GPU-aaaa 15\n", body)


def test_what_the_driver_reported_before_a_new_init_is_heard_after_it() -> None:
    async def body(stub: Stub) -> None:
        now_s = 0.0
        session = Session(clock=lambda: now_s)
        session.sample(["GPU-aaaa"])
        stub.add("event 1 GPU-bbbb 8 79")
        now_s = 31.0
        session.sample(["GPU-aaaa"])
        assert [event.xid for event in session.events()] == [79]
        assert session.events() == ()

    run_with_stub(TWO_GPUS + "fail handle GPU-aaaa 15\n", body)


def test_a_slow_new_init_is_given_its_own_time_and_not_a_samples() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml(deadline_s=0.1)
        await nvml.inventory()
        stub.add("hang init *", "forget 1")
        slow = asyncio.create_task(nvml.sample(["GPU-aaaa"]))
        beside = asyncio.create_task(nvml.sample(["GPU-bbbb"]))  # queued behind it
        done, _ = await asyncio.wait({slow, beside}, timeout=0.5)
        assert not done
        stub.remove("hang")
        assert isinstance((await slow)["GPU-aaaa"], GpuSample)
        assert isinstance((await beside)["GPU-bbbb"], GpuSample)
        await nvml.close()

    run_with_stub(TWO_GPUS, body)


def test_an_init_that_never_ends_is_said_so() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml(deadline_s=0.1, init_deadline_s=0.3)
        with pytest.raises(DeviceError, match=r"has not answered.*\(in init\)"):
            await nvml.sample(["GPU-aaaa"])
        stub.remove("hang")

    run_with_stub(TWO_GPUS + "hang init *\n", body)


def test_a_driver_that_forgot_us_is_initialised_again_at_once() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml()
        await nvml.inventory()
        stub.add("forget 1")
        look = (await nvml.sample(["GPU-aaaa"]))["GPU-aaaa"]
        assert isinstance(look, GpuSample)
        assert look.used_bytes == 4 * GIB

    run_with_stub(TWO_GPUS, body)


@pytest.mark.parametrize("code", [9, 12])
def test_no_driver_is_a_cpu_node_without_a_thread(code: int) -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml()
        found = await nvml.inventory()
        assert (found.gpus, found.driver_version, found.cuda_version) == ((), None, None)
        assert await nvml.events() == ()
        assert await nvml.sample([]) == {}
        assert _nvml_threads() == []
        stub.change("init", "init 0")  # the driver is loaded after the node started
        assert len((await nvml.inventory()).gpus) == 2

    run_with_stub(TWO_GPUS + f"init {code}\n", body)


def test_a_broken_driver_is_an_error_and_not_a_cpu_node() -> None:
    async def body(stub: Stub) -> None:
        with pytest.raises(DeviceError, match=r"cannot be initialised.*version mismatch"):
            await Nvml().inventory()

    run_with_stub(TWO_GPUS + "init 18\n", body)


def test_a_hung_call_blocks_nobody_and_ends_when_it_answers() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml(deadline_s=0.2)
        await nvml.inventory()
        stub.add("hang memory GPU-bbbb")
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        ticking = asyncio.create_task(tick())
        with pytest.raises(DeviceError, match=r"has not answered.*\(in sample\)"):
            await nvml.sample(["GPU-aaaa", "GPU-bbbb"])
        assert ticks > 2, "the event loop was blocked"
        assert nvml.stuck_for_s is not None
        with pytest.raises(DeviceError, match=r"has not answered.*\(in sample\)"):
            async with asyncio.timeout(20):  # fails at once while the thread hangs, although its deadline is a minute
                await nvml.inventory()
        assert len(_nvml_threads()) == 1, "no second thread is started"
        stub.remove("hang")
        while nvml.stuck_for_s is not None:
            await asyncio.sleep(0.01)
        assert isinstance((await nvml.sample(["GPU-bbbb"]))["GPU-bbbb"], GpuSample)
        ticking.cancel()
        await nvml.close()

    run_with_stub(TWO_GPUS, body)


def test_closing_does_not_wait_for_a_hung_call() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml(deadline_s=0.1)
        await nvml.inventory()
        stub.add("hang memory *")
        with pytest.raises(DeviceError):
            await nvml.sample(["GPU-aaaa"])
        await nvml.close()

    run_with_stub(TWO_GPUS, body)


def test_a_caller_that_gave_up_does_not_stop_the_thread() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml()
        asking = asyncio.create_task(nvml.sample(["GPU-aaaa"]))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert isinstance((await nvml.sample(["GPU-aaaa"]))["GPU-aaaa"], GpuSample)

    run_with_stub(TWO_GPUS, body)


def test_xid_and_ecc_events_name_their_board_once() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml()
        await nvml.inventory()
        assert await nvml.events() == ()
        stub.add("event 1 GPU-bbbb 8 79", "event 2 GPU-aaaa 2 0", "event 3 GPU-aaaa 8 31 5", "event 4 GPU-aaaa 4 0")
        first, second, third = await nvml.events()
        assert (first.kind, first.board, first.xid, first.gpu_instance) == (EventKind.XID, "GPU-bbbb", 79, None)
        assert (second.kind, second.board, second.xid) == (EventKind.ECC_DOUBLE_BIT, "GPU-aaaa", None)
        assert (third.board, third.xid, third.gpu_instance) == ("GPU-aaaa", 31, 5)
        assert await nvml.events() == ()

    run_with_stub(TWO_GPUS, body)


def test_mig_slices_are_devices_and_share_their_boards_readings() -> None:
    async def body(stub: Stub) -> None:
        nvml = Nvml()
        gpus = (await nvml.inventory()).gpus
        assert [(gpu.index, gpu.uuid) for gpu in gpus] == [(0, "MIG-1111"), (0, "MIG-2222"), (1, "GPU-bbbb")]
        assert gpus[1].mig == MigSlice("GPU-aaaa", 2, 0)
        assert gpus[1].memory_total_bytes == 20 * GIB
        look = (await nvml.sample(["MIG-2222"]))["MIG-2222"]
        assert isinstance(look, GpuSample)
        assert (look.board, look.power_w, look.temperature_c) == ("GPU-aaaa", 612.345, 61)
        assert (look.used_bytes, look.utilization_percent, look.pids) == (7, None, {77})

    run_with_stub(
        TWO_GPUS
        + f"""
        mig GPU-aaaa MIG-1111 {40 * GIB} 1 0
        mig GPU-aaaa MIG-2222 {20 * GIB} 2 0
        set MIG-2222 used 7
        process MIG-2222 77 7
        """,
        body,
    )


def test_a_board_in_mig_mode_without_slices_is_no_gpu_that_cuda_could_use() -> None:
    async def body(stub: Stub) -> None:
        found = await Nvml().inventory()
        assert [gpu.uuid for gpu in found.gpus] == ["GPU-bbbb"]
        (problem,) = found.unusable
        assert problem.startswith("GPU 0: MIG mode is on")

    run_with_stub(TWO_GPUS + "set GPU-aaaa mig 1\n", body)


def test_the_library_is_found_as_the_loader_finds_it(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(TWO_GPUS)
    ask = "import asyncio; from flowmesh.node.nvml.client import Nvml; print(len(asyncio.run(Nvml().inventory()).gpus))"
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(library().parent),
        "FLOWMESH_NVML_STUB": str(tmp_path / "script"),
    }
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2", "and the process exits although NVML was not closed"
