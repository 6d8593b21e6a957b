"""What a run cost: peak memory of its processes and GPUs, and joules where the machine counts them."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

RAPL = Path("/sys/class/powercap")


def peak_host_bytes() -> int:
    """The most memory that this process has had at a time (what it shares with its fork server included)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gpu_bytes() -> int:
    """The most memory that torch has held on this process's GPUs; 0 without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.max_memory_reserved(device) for device in range(torch.cuda.device_count()))


class EnergyMeter:
    """Joules since it was made, from the counters of the GPUs (NVML) and of the CPU packages (RAPL).

    RAPL counts the whole machine, and is read by root only; a counter that cannot be read is None in the answer.
    """

    def __init__(self, gpus: tuple[str, ...]) -> None:
        self._gpus = gpus
        self._gpu_began = _gpu_joules(gpus)
        self._cpu_began = _rapl()

    def read(self) -> dict[str, Any]:
        gpu_now, cpu_now = _gpu_joules(self._gpus), _rapl()
        gpu = None if gpu_now is None or self._gpu_began is None else round(gpu_now - self._gpu_began, 3)
        cpu = None
        if cpu_now and cpu_now.keys() == self._cpu_began.keys():
            cpu = round(sum(_passed(self._cpu_began[zone], cpu_now[zone]) for zone in cpu_now), 3)
        known = [joules for joules in (gpu, cpu) if joules is not None]
        return {"joules": round(sum(known), 3) if known else None, "gpu_joules": gpu, "cpu_joules": cpu}


def _gpu_joules(gpus: tuple[str, ...]) -> float | None:
    if not gpus:
        return None
    try:
        import pynvml
    except ImportError:  # an environment of its own may lack it; the node counts, too
        return None
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByUUID(gpu) for gpu in gpus]
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000
    except pynvml.NVMLError:  # a GPU older than Volta has no such counter
        return None


def _rapl() -> dict[str, tuple[int, int]]:
    """Each CPU package's counter and where it wraps around, in microjoules."""
    found = {}
    for zone in RAPL.glob("intel-rapl:[0-9]*"):
        if zone.name.count(":") != 1:
            continue  # a part of a package, counted there
        try:
            now = int((zone / "energy_uj").read_text())
            found[zone.name] = now, int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            continue
    return found


def _passed(began: tuple[int, int], now: tuple[int, int]) -> float:
    return (now[0] - began[0]) % (now[1] + 1) / 1e6
