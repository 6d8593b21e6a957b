"""Peak memory of a run's processes and GPUs, and its energy where the machine has counters."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from typing import Any

RAPL = Path("/sys/class/powercap")
LOOK_S = 60.0
"""The CPU's counters wrap around after a quarter of an hour, some after four minutes."""


def peak_host_bytes() -> int:
    """Peak resident bytes of this process, including what it shares with its fork server."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gpu_bytes() -> int:
    """Peak bytes allocated by torch on this process's GPUs; 0 without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.max_memory_reserved(device) for device in range(torch.cuda.device_count()))


class EnergyMeter:
    """Joules since it was made, from the counters of the GPUs (NVML) and of the CPU packages (RAPL).

    RAPL counts the whole machine, and is read by root only; a counter that cannot be read is None in the answer. Has a
    thread where there is RAPL: make it in the process that trains, after all forks.
    """

    def __init__(self, gpus: tuple[str, ...], root: Path = RAPL) -> None:
        self._gpus, self._root = gpus, root
        self._gpu_began = _gpu_joules(gpus)
        self._cpu_uj, self._last = 0, _rapl(root)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, name="energy", daemon=True)
        if self._last:
            self._thread.start()

    def read(self) -> dict[str, Any]:
        """The joules so far. Stops counting."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self.look()
        gpu_now = _gpu_joules(self._gpus)
        gpu = None if gpu_now is None or self._gpu_began is None else round(gpu_now - self._gpu_began, 3)
        cpu = round(self._cpu_uj / 1e6, 3) if self._last else None
        known = [joules for joules in (gpu, cpu) if joules is not None]
        return {"joules": round(sum(known), 3) if known else None, "gpu_joules": gpu, "cpu_joules": cpu}

    def look(self) -> None:
        """Add the CPU's energy since the last sample."""
        if not self._last:
            return
        now = _rapl(self._root)
        if now.keys() == self._last.keys():
            self._cpu_uj += sum((now[zone][0] - self._last[zone][0]) % (now[zone][1] + 1) for zone in now)
            self._last = now
        else:  # no longer readable
            self._last = {}

    def _keep_up(self) -> None:
        while not self._done.wait(LOOK_S):
            self.look()


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


def _rapl(root: Path) -> dict[str, tuple[int, int]]:
    """Each CPU package's counter and where it wraps around, in microjoules.

    Other zones hold parts of a package, or (`psys`) the whole machine: they would count joules twice.
    """
    found = {}
    for zone in root.glob("intel-rapl:[0-9]*"):
        try:
            if (zone / "name").read_text().startswith("package-"):
                now = int((zone / "energy_uj").read_text())
                found[zone.name] = now, int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            continue
    return found
