"""Power and energy: exact joules from counters, integrated power without them, null where nothing is known."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.node.devices import GpuInfo, GpuLost, GpuSample, MigSlice
from flowmesh.node.power import PowerMeter
from flowmesh.node.rapl import Rapl

RANGE_UJ = 262_143_328_850


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def zone(root: Path, folder: str, name: str, energy_uj: int, range_uj: int = RANGE_UJ) -> Path:
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path


def gpu(index: int, uuid: str) -> GpuInfo:
    return GpuInfo(index=index, uuid=uuid, name="NVIDIA H100", memory_total_bytes=80 << 30)


def look(
    uuid: str, *, energy_mj: int | None = None, power_w: float | None = None, board: str | None = None
) -> GpuSample:
    return GpuSample(uuid=uuid, board=board or uuid, used_bytes=0, energy_mj=energy_mj, power_w=power_w)


A, B = gpu(0, "GPU-a"), gpu(1, "GPU-b")


@given(st.lists(st.integers(0, 999), min_size=1, max_size=30), st.integers(0, 999))
def test_rapl_adds_up_over_wrap_arounds(tmp_path_factory: pytest.TempPathFactory, steps: list[int], start: int) -> None:
    root = tmp_path_factory.mktemp("powercap")
    counter = zone(root, "intel-rapl:0", "package-0", start, 1000) / "energy_uj"
    rapl = Rapl(root)
    total_j = 0.0
    for position in itertools.accumulate(steps, initial=start):
        counter.write_text(str(position % 1000))
        total_j += rapl.advance_j() or 0.0
    assert total_j * 1e6 == pytest.approx(sum(steps))


def test_rapl_counts_packages_and_not_their_parts(tmp_path: Path) -> None:
    zones = [
        zone(tmp_path, "intel-rapl:0", "package-0", 0),
        zone(tmp_path, "intel-rapl:1", "package-1", 0),
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:0:1", "dram", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    rapl = Rapl(tmp_path)
    for each in zones:
        (each / "energy_uj").write_text("5000000")
    assert rapl.advance_j() == pytest.approx(10.0)


def test_what_is_not_there_is_said_once_and_null(tmp_path: Path) -> None:
    meter = PowerMeter(tmp_path / "none", Clock())
    assert meter.cpu_unavailable is not None
    assert "no CPU energy counters" in meter.cpu_unavailable
    meter.observe({})
    assert msgspec.to_builtins(meter.power([A]))["cpu_watts"] is None
    zone(tmp_path, "intel-rapl:0", "psys", 0)
    assert "has no package zone" in str(PowerMeter(tmp_path, Clock()).cpu_unavailable)


def test_a_counter_that_we_may_not_read_is_null_with_the_reason() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        counter = zone(root, "intel-rapl:0", "package-0", 0) / "energy_uj"
        for path in (root, counter.parent):
            path.chmod(0o755)
        counter.chmod(0)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)  # root may read everything
        try:
            meter = PowerMeter(root, Clock())
            meter.observe({})
        finally:
            os.seteuid(before)
    assert meter.power().cpu_watts is None
    assert meter.totals().cpu_j is None
    assert "cannot be read" in str(meter.cpu_unavailable)


def test_a_counter_that_goes_away_stops_cpu_power_only(tmp_path: Path) -> None:
    clock = Clock()
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = PowerMeter(tmp_path, clock)
    meter.observe({"GPU-a": look("GPU-a", energy_mj=0)})
    (folder / "energy_uj").unlink()
    clock.now_s += 10
    meter.observe({"GPU-a": look("GPU-a", energy_mj=4_000_000)})
    power = meter.power([A])
    assert power.cpu_watts is None
    assert power.gpu_watts.total == pytest.approx(400.0)
    assert "stopped working" in str(meter.cpu_unavailable)


def test_the_heartbeats_fields_are_the_contracts(tmp_path: Path) -> None:
    clock = Clock()
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 1000) / "energy_uj"
    meter = PowerMeter(tmp_path, clock, timestamp=lambda: "2026-01-01T00:00:00+00:00")
    meter.observe({"GPU-a": look("GPU-a", energy_mj=0, power_w=290.0), "GPU-b": look("GPU-b", power_w=100.0)})
    clock.now_s += 36
    counter.write_text(str(1000 + 3_600_000_000))
    meter.observe({"GPU-a": look("GPU-a", energy_mj=10_800_000, power_w=310.5), "GPU-b": look("GPU-b", power_w=200.0)})
    assert msgspec.json.decode(msgspec.json.encode(meter.power([A, B]))) == {
        "timestamp": "2026-01-01T00:00:00+00:00",
        "cpu_watts": 100.0,
        "gpu_watts": {"total": 510.5, "per_gpu": [{"index": 0, "power_w": 310.5}, {"index": 1, "power_w": 200.0}]},
    }
    assert msgspec.json.decode(msgspec.json.encode(meter.summary([A, B]))) == {
        "uptime_sec": 36.0,
        "avg_cpu_watts": 100.0,
        "avg_gpu_watts": 450.0,  # 10.8 kJ by its counter, and 150 W between 100 and 200
        "per_gpu_avg_watts": {"0": 300.0, "1": 150.0},
        "estimated_energy_kwh": pytest.approx(0.0055),
        "estimated_energy_breakdown": {"cpu_kwh": 0.001, "gpu_kwh": pytest.approx(0.0045)},
        "samples": {"cpu": 1, "gpu": 1},
    }


def test_nothing_known_is_null_everywhere(tmp_path: Path) -> None:
    meter = PowerMeter(tmp_path, Clock())
    meter.observe({"GPU-a": look("GPU-a")})
    power, summary = msgspec.to_builtins(meter.power([A])), msgspec.to_builtins(meter.summary([A]))
    assert power["gpu_watts"] == {"total": None, "per_gpu": ({"index": 0, "power_w": None},)}
    assert (summary["avg_cpu_watts"], summary["avg_gpu_watts"], summary["estimated_energy_kwh"]) == (None, None, None)
    assert summary["estimated_energy_breakdown"] == {"cpu_kwh": None, "gpu_kwh": None}
    assert summary["per_gpu_avg_watts"] == {}
    assert msgspec.to_builtins(PowerMeter(tmp_path, Clock()).power())["gpu_watts"] == {"total": None, "per_gpu": ()}


def test_a_slot_sees_only_its_own_gpus(tmp_path: Path) -> None:
    clock = Clock()
    meter = PowerMeter(tmp_path, clock)
    for energy_mj in (0, 1_000_000):
        clock.now_s += 10
        meter.observe({"GPU-a": look("GPU-a", energy_mj=energy_mj), "GPU-b": look("GPU-b", energy_mj=9 * energy_mj)})
    assert meter.power([B]).gpu_watts.total == pytest.approx(900.0)
    assert meter.summary([A]).avg_gpu_watts == pytest.approx(100.0)


def test_the_slices_of_one_board_are_counted_once(tmp_path: Path) -> None:
    clock = Clock()
    meter = PowerMeter(tmp_path, clock)
    slices = [
        GpuInfo(index=0, uuid=f"MIG-{n}", name="1g", memory_total_bytes=1, mig=MigSlice("GPU-a", n, 0)) for n in (1, 2)
    ]
    for energy_mj in (0, 1_000_000):
        clock.now_s += 10
        meter.observe({each.uuid: look(each.uuid, board="GPU-a", energy_mj=energy_mj) for each in slices})
    assert meter.power(slices).gpu_watts.total == pytest.approx(100.0)
    assert meter.totals().board_j == {"GPU-a": pytest.approx(1000.0)}
    meter.observe({"MIG-1": GpuLost("MIG-1", "GPU is lost")})
    assert meter.power(slices).gpu_watts.total is None


def test_an_energy_counter_that_was_set_back_falls_back_to_power(tmp_path: Path) -> None:
    clock = Clock()
    meter = PowerMeter(tmp_path, clock)
    for energy_mj, power_w in ((9_000_000, 100.0), (5, 300.0)):
        clock.now_s += 10
        meter.observe({"GPU-a": look("GPU-a", energy_mj=energy_mj, power_w=power_w)})
    assert meter.totals().board_j["GPU-a"] == pytest.approx(2000.0)


def test_nothing_is_made_up_for_a_long_gap_in_sampled_power(tmp_path: Path) -> None:
    clock = Clock()
    meter = PowerMeter(tmp_path, clock)
    for _ in range(2):
        clock.now_s += 3600
        meter.observe({"GPU-a": look("GPU-a", power_w=700.0)})
    assert meter.totals().board_j == {}
    clock.now_s += 60
    meter.observe({"GPU-a": look("GPU-a", power_w=700.0)})
    assert meter.totals().board_j["GPU-a"] == pytest.approx(42_000.0)
    assert meter.summary([A]).avg_gpu_watts == pytest.approx(700.0), "the mean is over the seconds that are known"


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 10**9)), min_size=1, max_size=20))
def test_the_sum_of_the_steps_is_what_the_counter_went_up(steps: list[tuple[int, int]]) -> None:
    clock = Clock()
    meter = PowerMeter(Path("/nonexistent"), clock)
    energy_mj = 0
    meter.observe({"GPU-a": look("GPU-a", energy_mj=0)})
    for seconds, used_mj in steps:
        clock.now_s += seconds
        energy_mj += used_mj
        meter.observe({"GPU-a": look("GPU-a", energy_mj=energy_mj)})
    assert meter.totals().board_j["GPU-a"] == pytest.approx(energy_mj / 1000)


def test_the_machines_cpu_seconds_never_go_back(tmp_path: Path) -> None:
    meter = PowerMeter(tmp_path, Clock())
    first = meter.totals().cpu_busy_s
    sum(range(2_000_000))
    assert meter.totals().cpu_busy_s >= first > 0


def test_looks_in_quick_turn_lose_no_joule_and_shake_no_watts(tmp_path: Path) -> None:
    clock = Clock()
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0) / "energy_uj"
    meter = PowerMeter(tmp_path, clock)
    energy_j = 0
    for seconds, joules in ((30.0, 3000), (0.001, 50), (0.001, 0), (29.998, 2950)):
        clock.now_s += seconds
        energy_j += joules
        counter.write_text(str(energy_j * 1_000_000))
        meter.observe({"GPU-a": look("GPU-a", energy_mj=energy_j * 1000)})
        assert meter.power([A]).cpu_watts == pytest.approx(100.0)
    assert meter.totals().cpu_j == pytest.approx(6000.0)
    assert meter.totals().board_j["GPU-a"] == pytest.approx(3000.0)
    assert meter.power([A]).gpu_watts.total == pytest.approx(100.0)
