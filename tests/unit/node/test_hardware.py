"""`hardware_json`: the contract's fields, and only what this process may really use."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from flowmesh.node import hardware
from flowmesh.node.devices import GpuInfo

GIB = 1 << 30
H100 = GpuInfo(index=1, uuid="GPU-bbbb", name="NVIDIA H100 80GB HBM3", memory_total_bytes=80 * GIB)


def machine(tmp_path: Path, files: dict[str, str]) -> dict[str, Path]:
    """A procfs and a cgroup tree with these files, as `collect` takes them."""
    for name, text in {"proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\n", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"proc": tmp_path / "proc", "cgroups": tmp_path / "cgroup"}


def test_it_encodes_as_the_contract_has_it() -> None:
    found = hardware.collect([H100], driver_version="570.86", cuda_version="12.8", bandwidth_bytes_per_sec=125_000_000)
    plain = msgspec.json.decode(msgspec.json.encode(found))
    assert plain["gpu"] == {
        "driver_version": "570.86",
        "cuda_version": "12.8",
        "gpus": [{"index": 1, "name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-bbbb", "memory_total_bytes": 80 * GIB}],
    }
    assert set(plain) == {"cpu", "memory", "gpu", "network"}
    assert set(plain["cpu"]) == {"logical_cores", "model"}
    assert set(plain["memory"]) == {"total_bytes"}
    assert set(plain["network"]) == {"ip", "bandwidth_bytes_per_sec"}


def test_a_node_without_gpus_has_none_and_null_versions() -> None:
    plain = msgspec.json.decode(msgspec.json.encode(hardware.collect(driver_version="570.86", cuda_version="12.8")))
    assert plain["gpu"] == {"driver_version": None, "cuda_version": None, "gpus": []}
    assert "bandwidth_bytes_per_sec" not in plain["network"]


def test_it_agrees_with_the_machine() -> None:
    found = hardware.collect()
    assert 1 <= found.cpu.logical_cores <= len(os.sched_getaffinity(0))
    assert found.cpu.model
    assert 0 < found.memory.total_bytes <= psutil.virtual_memory().total
    assert found.network.ip is None or ipaddress.ip_address(found.network.ip)


def test_cores_follow_the_affinity() -> None:
    ask = (
        "import os; from flowmesh.node import hardware; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "print(hardware.collect().cpu.logical_cores)"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_a_slot_says_its_own_cpus() -> None:
    assert hardware.collect(cpus=3).cpu.logical_cores == 3


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "cgroup/a/b/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "cgroup/a/b/cpu.max": "max 100000", "cgroup/a/cpu.max": "199999 100000"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "cgroup/a/cpu.max": "20000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/../hidden\n", "cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/d\n0::/\n", "cgroup/cpu,cpuacct/d/cpu.cfs_quota_us": "100000\n",
          "cgroup/cpu,cpuacct/d/cpu.cfs_period_us": "100000\n"}, 1),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/d\n", "cgroup/cpu,cpuacct/d/cpu.cfs_quota_us": "-1\n",
          "cgroup/cpu,cpuacct/d/cpu.cfs_period_us": "100000\n"}, None),
        ({"proc/self/cgroup": "0::/a\n", "cgroup/a/cpu.max": "90000000 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a\n", "cgroup/a/cpu.max": "nonsense\n"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_cores_follow_the_tightest_quota(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    found = hardware.logical_cores(**machine(tmp_path, files))
    assert found == (len(os.sched_getaffinity(0)) if cores is None else cores)


@pytest.mark.parametrize(
    ("files", "total"),
    [
        ({}, 16 * GIB),
        ({"proc/self/cgroup": "0::/a/b\n", "cgroup/a/b/memory.max": "max\n"}, 16 * GIB),
        ({"proc/self/cgroup": "0::/a/b\n", "cgroup/a/b/memory.max": "max", "cgroup/a/memory.max": f"{GIB}"}, GIB),
        ({"proc/self/cgroup": "0::/a\n", "cgroup/a/memory.max": str(64 * GIB)}, 16 * GIB),
        ({"proc/self/cgroup": "5:memory:/d\n", "cgroup/memory/d/memory.limit_in_bytes": str(2 * GIB)}, 2 * GIB),
        ({"proc/self/cgroup": "5:memory:/\n", "cgroup/memory/memory.limit_in_bytes": f"{(1 << 63) - 4096}"}, 16 * GIB),
        ({"proc/self/cgroup": "5:memory:/gone/away\n", "cgroup/memory/memory.limit_in_bytes": str(GIB)}, GIB),
    ],
)  # fmt: skip
def test_memory_follows_the_tightest_limit(tmp_path: Path, files: dict[str, str], total: int) -> None:
    assert hardware.memory_total_bytes(**machine(tmp_path, files)) == total


def test_the_model_comes_from_cpuinfo_and_arm_has_none(tmp_path: Path) -> None:
    machine(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel\t\t: 167\nmodel name\t: AMD EPYC 9654\n"})
    assert hardware.cpu_model(tmp_path / "proc") == "AMD EPYC 9654"
    machine(tmp_path, {"proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"})
    assert hardware.cpu_model(tmp_path / "proc")


def test_without_a_driver_library_the_binding_is_not_imported() -> None:
    ask = (
        "import asyncio, sys, threading; from flowmesh.node.nvml.client import Nvml; nvml = Nvml();"
        "found = asyncio.run(nvml.inventory());"
        "print(found.gpus == () and 'pynvml' not in sys.modules and threading.active_count() == 1)"
    )
    if subprocess.run([sys.executable, "-c", "import ctypes; ctypes.CDLL('libnvidia-ml.so.1')"], check=False,
                      capture_output=True).returncode == 0:  # fmt: skip
        pytest.skip("this machine has the driver's library")
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
