"""What one task used: its own GPUs' joules, its share of the CPU's, its cost."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.node.devices import GpuInfo, GpuLost, GpuSample, MigSlice
from flowmesh.node.energy import ProcessUse, TaskMeter, TaskUsage
from flowmesh.node.power import Totals
from flowmesh.node.release_report import GpuRelease, ReleaseReport
from flowmesh.node.release_state import GpuState

A = GpuInfo(index=0, uuid="GPU-a", name="NVIDIA H100", memory_total_bytes=80 << 30)
B = GpuInfo(index=1, uuid="GPU-b", name="NVIDIA H100", memory_total_bytes=80 << 30)


def totals(cpu_j: float | None, busy_s: float, **board_j: float) -> Totals:
    boards = {name.replace("_", "-"): joules for name, joules in board_j.items()}
    return Totals(at_s=0.0, cpu_j=cpu_j, cpu_busy_s=busy_s, board_j=boards)


def use(gpus: list[GpuInfo], start: Totals, end: Totals, cpu_seconds: float | None = None) -> TaskUsage:
    return TaskMeter(gpus, start).finish(
        end, runtime_s=1800, cost_per_hour=3.0, processes=ProcessUse(cpu_seconds=cpu_seconds)
    )


def test_a_task_has_its_own_gpus_joules_and_its_share_of_the_cpus() -> None:
    start = totals(1000.0, 50.0, GPU_a=500.0, GPU_b=700.0)
    end = totals(5000.0, 90.0, GPU_a=3_600_500.0, GPU_b=9_999_999.0)
    used = use([A], start, end, cpu_seconds=10.0)
    assert used.energy.gpu_joules == 3_600_000.0
    assert used.energy.cpu_joules == 1000.0
    assert used.energy.kwh == pytest.approx(1 + 1 / 3600, abs=1e-6)
    assert used.cost_usd == 1.5


def test_what_is_unknown_is_null() -> None:
    nothing = use([A], totals(None, 0.0), totals(None, 10.0), cpu_seconds=5.0)
    assert (nothing.energy.gpu_joules, nothing.energy.cpu_joules, nothing.energy.kwh) == (None, None, None)
    cpu_only = use([], totals(0.0, 0.0), totals(100.0, 10.0), cpu_seconds=5.0)
    assert (cpu_only.energy.gpu_joules, cpu_only.energy.cpu_joules) == (None, 50.0)
    slice_ = GpuInfo(index=0, uuid="MIG-1", name="1g", memory_total_bytes=1, mig=MigSlice("GPU-a", 1, 0))
    assert use([slice_], totals(None, 0.0, GPU_a=0.0), totals(None, 0.0, GPU_a=9.0)).energy.gpu_joules is None


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=6),
    st.floats(0, 1e9),
    st.floats(0, 1e6),
)
def test_the_tasks_of_a_node_never_claim_more_than_the_cpu_used(
    seconds: list[float], cpu_j: float, others_s: float
) -> None:
    start, end = totals(0.0, 0.0), totals(cpu_j, sum(seconds) + others_s)
    claimed = sum(use([], start, end, cpu_seconds=each).energy.cpu_joules or 0.0 for each in seconds)
    assert claimed <= cpu_j * (1 + 1e-6) + 0.001 * len(seconds)


def test_utilisation_and_memory_are_of_its_own_gpus_only() -> None:
    meter = TaskMeter([A], totals(None, 0.0))
    for percent, used_bytes, celsius in ((10, 100, 50), (90, 300, 71), (50, 200, 60)):
        mine = GpuSample(
            uuid="GPU-a",
            board="GPU-a",
            used_bytes=used_bytes,
            utilization_percent=percent,
            temperature_c=celsius,
            throttled=("sw_power_cap",) if percent == 90 else (),
        )
        other = GpuSample(uuid="GPU-b", board="GPU-b", used_bytes=1 << 40, utilization_percent=100)
        meter.observe({"GPU-a": mine, "GPU-b": other})
    meter.observe({"GPU-a": GpuLost("GPU-a", "GPU is lost")})
    proof = GpuRelease(
        state=GpuState.RELEASED, before_bytes=7, peak_bytes=400, after_bytes=8, pids_before=(3,), pids_after=(3,)
    )
    used = meter.finish(
        totals(None, 0.0),
        runtime_s=1.0,
        cost_per_hour=0.0,
        processes=ProcessUse(cpu_seconds=2.0, peak_rss_bytes=3, read_bytes=4, written_bytes=5),
        release=ReleaseReport(released=True, ms=12.5, gpus={"GPU-a": proof}),
    )
    assert msgspec.to_builtins(used.resources) == {
        "cpu_seconds": 2.0,
        "peak_rss_bytes": 3,
        "read_bytes": 4,
        "written_bytes": 5,
        "gpu_release_ms": 12.5,
        "gpu_held": None,
        "gpus": {
            "GPU-a": {
                "index": 0,
                "utilization_mean_percent": 50.0,
                "utilization_peak_percent": 90,
                "memory_mean_bytes": 200,
                "memory_before_bytes": 7,
                "memory_peak_bytes": 400,
                "memory_after_bytes": 8,
                "processes_before": (3,),
                "processes_after": (3,),
                "temperature_peak_c": 71,
                "throttled": ("sw_power_cap",),
            }
        },
    }


def test_a_gpu_that_was_never_looked_at_has_nulls_and_not_zeros() -> None:
    (gpu,) = use([B], totals(None, 0.0), totals(None, 0.0)).resources.gpus.values()
    assert (gpu.utilization_mean_percent, gpu.utilization_peak_percent, gpu.memory_peak_bytes) == (None, None, None)
