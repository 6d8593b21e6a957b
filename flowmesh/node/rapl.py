"""CPU energy from the kernel's powercap counters (RAPL; Intel and AMD), whole packages only.

The counters are in microjoules and wrap around; on most kernels only root may read them.
"""

from __future__ import annotations

import re
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")

_ZONE = re.compile(r"intel-rapl:\d+")
# `psys` holds the whole platform and `core`, `dram` … parts of a package: adding them would count joules twice.
_PACKAGE = re.compile(r"package-\d+.*")


class _Package:
    def __init__(self, folder: Path) -> None:
        self.counter = folder / "energy_uj"
        self.range_uj = int((folder / "max_energy_range_uj").read_text())
        self.last_uj = int(self.counter.read_text())

    def advance(self) -> int:
        """Microjoules since the last call, at most one wrap-around ago."""
        now_uj = int(self.counter.read_text())
        used_uj = now_uj - self.last_uj
        self.last_uj = now_uj
        return used_uj if used_uj >= 0 else used_uj + self.range_uj


class Rapl:
    """Joules of all CPU packages together.

    At 250 W the usual counter wraps after about 17 minutes, the smallest after four: read it at least every minute.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._packages: list[_Package] = []
        self.unavailable: str | None = None
        """Why there is no reading, for logs; None where there is one."""
        try:
            zones = sorted(zone for zone in root.iterdir() if _ZONE.fullmatch(zone.name))
            self._packages = [_Package(zone) for zone in zones if _PACKAGE.match((zone / "name").read_text())]
        except FileNotFoundError:
            self.unavailable = f"no CPU energy counters: {root} has no intel-rapl"
        except PermissionError as error:
            self.unavailable = f"CPU energy counters cannot be read: {error.filename}; run as root or grant read access"
        except (OSError, ValueError) as error:
            self.unavailable = f"CPU energy counters do not work: {error}"
        if self.unavailable is None and not self._packages:
            self.unavailable = f"no CPU energy counters: {root} has no package zone"

    def advance_j(self) -> float | None:
        """Joules since the last call (or since the start); None where they are unknown."""
        if self.unavailable is not None:
            return None
        try:
            return sum(package.advance() for package in self._packages) / 1e6
        except (OSError, ValueError) as error:
            self._packages, self.unavailable = [], f"CPU energy counters stopped working: {error}"
            return None
