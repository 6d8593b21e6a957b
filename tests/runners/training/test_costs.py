"""Joules from the CPU's counters, which wrap around many times in a long run."""

from __future__ import annotations

from pathlib import Path

from runners.training.costs import EnergyMeter

RANGE_UJ = 999


def zone(root: Path, number: str, name: str, energy_uj: int) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    return folder / "energy_uj"


def test_packages_are_counted_over_their_wrap_arounds(tmp_path: Path) -> None:
    package, other = zone(tmp_path, "0", "package-0", 900), zone(tmp_path, "1", "package-1", 0)
    zone(tmp_path, "0:0", "core", 0)
    machine = zone(tmp_path, "2", "psys", 0)
    meter = EnergyMeter((), tmp_path)
    package.write_text("100\n")  # 200 more: over the end
    machine.write_text("500\n")
    meter.look()
    package.write_text("50\n")  # 950 more: over it again
    other.write_text("850\n")
    assert meter.read() == {"joules": 0.002, "gpu_joules": None, "cpu_joules": 0.002}


def test_a_counter_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    unknown = {"joules": None, "gpu_joules": None, "cpu_joules": None}
    assert EnergyMeter((), tmp_path).read() == unknown
    counter = zone(tmp_path, "0", "package-0", 1)
    meter = EnergyMeter((), tmp_path)
    counter.unlink()
    assert meter.read() == unknown
