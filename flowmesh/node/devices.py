"""What NVML says, as frozen structs, and which of a node's GPUs CUDA_VISIBLE_DEVICES lets it offer.

Devices are named by UUID; an index is for people and for the contract's `hardware_json`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from flowmesh.errors import ConfigError

_NO_DEVICES = "NoDevFiles"  # what Slurm sets for a job without GPUs


class MigSlice(msgspec.Struct, frozen=True):
    """Where a MIG device lies: its board, GPU instance and compute instance."""

    board: str
    gpu_instance: int
    compute_instance: int


class GpuInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU, or a slice of one, that tasks can be given."""

    index: int
    """NVML's (PCI bus order, as nvidia-smi counts); a MIG slice has its board's."""
    uuid: str
    """`GPU-…` or `MIG-…`"""
    name: str
    memory_total_bytes: int
    mig: MigSlice | None = None

    @property
    def board(self) -> str:
        """UUID of the physical GPU: what has one power reading, one temperature and one Xid."""
        return self.uuid if self.mig is None else self.mig.board


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """All GPUs that the driver shows. Without a driver: none, and the versions None."""

    gpus: tuple[GpuInfo, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    """The newest CUDA that the driver serves, such as `12.8`."""
    unusable: tuple[str, ...] = ()
    """GPUs that the driver counts and cannot talk to: one line each, such as `GPU 3: GPU is lost`."""

    @property
    def some_are_down(self) -> bool:
        """Whether a GPU that is missing here may be one that does not work now, or there is no driver for any."""
        return bool(self.unusable) or self.driver_version is None


class GpuProcess(msgspec.Struct, frozen=True):
    """A process that has something on a GPU."""

    pid: int
    """As the driver counts: in a container it may be the host's number, or that of a thread of the process."""
    used_bytes: int | None = None
    """None: the driver does not tell, as in many containers."""


class GpuSample(msgspec.Struct, frozen=True, kw_only=True):
    """One look at one GPU. None: this device or driver does not tell."""

    uuid: str
    board: str
    """Whose power, energy, temperature and throttling these are; the same for all MIG slices of one board."""
    used_bytes: int
    processes: tuple[GpuProcess, ...] | None = ()
    """Those with a compute context."""
    graphics: tuple[GpuProcess, ...] = ()
    """Those that only draw, such as a display server: nobody minds them, and their bytes come and go."""
    utilization_percent: int | None = None
    power_w: float | None = None
    energy_mj: int | None = None
    """Millijoules since the driver was loaded."""
    temperature_c: int | None = None
    throttled: tuple[str, ...] = ()
    """Why its clocks are held down, such as `hw_thermal`; empty when they are not."""

    @property
    def pids(self) -> frozenset[int]:
        """Of the processes that compute."""
        return frozenset(process.pid for process in self.processes or ())

    @property
    def graphics_bytes(self) -> int:
        return sum(process.used_bytes or 0 for process in self.graphics)


class GpuLost(msgspec.Struct, frozen=True):
    """A GPU that does not answer while the driver does."""

    uuid: str
    why: str


Look = GpuSample | GpuLost


class EventKind(enum.StrEnum):
    XID = "xid"
    ECC_DOUBLE_BIT = "ecc_double_bit"
    UNAVAILABLE = "unavailable"


class GpuEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A critical event that the driver reported."""

    kind: EventKind
    board: str | None
    """None where the driver does not say which GPU: then it may be any."""
    xid: int | None = None
    gpu_instance: int | None = None
    """The MIG slice, where the driver narrows it down."""


class NoSuchGpuError(ConfigError):
    """A setting names a GPU that is not there."""


def visible_gpus(gpus: Sequence[GpuInfo], setting: str | None, *, some_are_down: bool = False) -> tuple[GpuInfo, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order.

    Takes what CUDA takes: indices, UUIDs or unique beginnings of them, `MIG-<uuid>` and the older
    `MIG-GPU-<uuid>/<gpu instance>/<compute instance>`; None means all, an empty string none, and a negative index
    ends the list. Indices are in PCI bus order; on a node of mixed models CUDA's own order differs from it
    unless CUDA_DEVICE_ORDER=PCI_BUS_ID, so UUIDs are the safe names there.

    Args:
        some_are_down: leave out what matches no GPU: one that fell off the bus must not take the others along.

    Raises:
        ConfigError: an entry matches no GPU, more than one, or one that is already listed.
    """
    if setting is None:
        return tuple(gpus)
    if setting.strip() in {"", _NO_DEVICES}:
        return ()
    chosen: list[GpuInfo] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.startswith("-") and entry[1:].isdigit():
            break
        try:
            gpu = find_gpu(gpus, entry, "CUDA_VISIBLE_DEVICES")
        except NoSuchGpuError:
            if some_are_down:
                continue
            raise
        if gpu in chosen:
            raise ConfigError(f"CUDA_VISIBLE_DEVICES: {entry!r} names {gpu.uuid} a second time; list each GPU once")
        chosen.append(gpu)
    return tuple(chosen)


def find_gpu(gpus: Sequence[GpuInfo], entry: str, where: str) -> GpuInfo:
    """The one GPU that `entry` names, as in `visible_gpus`.

    Args:
        where: the setting that `entry` comes from, for the error.

    Raises:
        NoSuchGpuError: it names none.
        ConfigError: it names more than one, or one that is cut into slices.
    """
    if entry.isdecimal():
        found = [gpu for gpu in gpus if gpu.index == int(entry)]
    elif "/" in entry:
        found = [gpu for gpu in gpus if gpu.mig is not None and _old_mig_name(gpu.mig) == entry.lower()]
    elif entry:
        found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(entry.lower())]
        if not found:
            found = [gpu for gpu in gpus if gpu.mig is not None and gpu.board.lower().startswith(entry.lower())]
    else:
        raise ConfigError(f"{where}: an entry is empty; list indices or UUIDs with one comma between them")
    names = ", ".join(f"{gpu.index} {gpu.uuid}" for gpu in found or gpus)
    if not found:
        raise NoSuchGpuError(f"{where}: {entry!r} matches no GPU; this node has: {names or 'none'}")
    sliced = found[0].mig is not None and not entry.upper().startswith("MIG-")
    if sliced:
        raise ConfigError(f"{where}: {entry!r} is cut into MIG slices; name a slice: {names}")
    if len(found) > 1:
        raise ConfigError(f"{where}: {entry!r} matches more than one GPU: {names}")
    return found[0]


def _old_mig_name(mig: MigSlice) -> str:
    return f"mig-{mig.board}/{mig.gpu_instance}/{mig.compute_instance}".lower()
