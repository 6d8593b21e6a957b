"""GPUs, their readings and their events as frozen structs, and which GPUs CUDA_VISIBLE_DEVICES leaves to a node.

Devices are identified by UUID; an index is for people and for the contract's `hardware_json`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

import msgspec

from flowmesh.errors import ConfigError

_WHOLE_UUID = re.compile(r"(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_NO_DEVICES = "NoDevFiles"  # what Slurm sets for a job without GPUs


class MigSlice(msgspec.Struct, frozen=True):
    """A MIG device's place: its board's UUID, GPU instance and compute instance."""

    board: str
    gpu_instance: int
    compute_instance: int


class GpuInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU, or a MIG slice of one, that a task can have."""

    index: int
    """NVML's index (PCI bus order, as in nvidia-smi); a MIG slice has its board's."""
    uuid: str
    """`GPU-…` or `MIG-…`"""
    name: str
    memory_total_bytes: int
    capability: tuple[int, int] | None = None
    """CUDA compute capability, such as (9, 0); None: the driver does not tell."""
    mig: MigSlice | None = None

    @property
    def board(self) -> str:
        """UUID of the physical GPU, which has one power reading and one temperature, and which an Xid concerns."""
        return self.uuid if self.mig is None else self.mig.board


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """All GPUs that the driver lists. Without a driver: none, and the versions are None."""

    gpus: tuple[GpuInfo, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    """The newest CUDA version that the driver supports, such as `12.8`."""
    unusable: tuple[str, ...] = ()
    """What does not work: GPUs that the driver counts and that do not answer, such as `GPU 3: GPU is lost`, or the
    driver itself; one line each."""

    @property
    def some_are_down(self) -> bool:
        """Whether a GPU that is not in `gpus` may exist: some do not answer, or there is no driver."""
        return bool(self.unusable) or self.driver_version is None


class GpuProcess(msgspec.Struct, frozen=True):
    """A process that uses a GPU."""

    pid: int
    """As the driver reports it: in a container it may be the host's pid, or the id of a thread."""
    used_bytes: int | None = None
    """None: the driver does not report it, as in many containers."""


class GpuSample(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of one GPU. None: this device or driver does not report it."""

    uuid: str
    board: str
    """The board that power, energy, temperature and throttling belong to; all MIG slices of a board share it."""
    used_bytes: int
    processes: tuple[GpuProcess, ...] | None = ()
    """Those with a compute context; None: the driver never lists them."""
    graphics: tuple[GpuProcess, ...] = ()
    """Those with a graphics context only, such as a display server: not a task's, and their memory use varies."""
    utilization_percent: int | None = None
    power_w: float | None = None
    energy_mj: int | None = None
    """Millijoules since the driver was loaded."""
    temperature_c: int | None = None
    throttled: tuple[str, ...] = ()
    """Why its clocks are reduced, such as `hw_thermal`; empty: they are not."""

    @property
    def pids(self) -> frozenset[int]:
        """Of the processes with a compute context."""
        return frozenset(process.pid for process in self.processes or ())

    @property
    def graphics_bytes(self) -> int:
        return sum(process.used_bytes or 0 for process in self.graphics)


class GpuLost(msgspec.Struct, frozen=True):
    """A GPU that does not answer while the driver does."""

    uuid: str
    why: str


GpuReading = GpuSample | GpuLost


class EventKind(enum.StrEnum):
    XID = "xid"
    ECC_DOUBLE_BIT = "ecc_double_bit"
    UNAVAILABLE = "unavailable"


class GpuEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A critical event that the driver reported."""

    kind: EventKind
    board: str | None
    """None: the driver does not report which GPU; it may be any."""
    xid: int | None = None
    gpu_instance: int | None = None
    """The MIG slice, where the driver reports one."""


class NoSuchGpuError(ConfigError):
    """Raised when a setting names a GPU that does not exist."""


def visible_gpus(gpus: Sequence[GpuInfo], setting: str | None, *, some_are_down: bool = False) -> tuple[GpuInfo, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES lists, in its order.

    Accepts what CUDA accepts: indices, UUIDs or unique prefixes of them, `MIG-<uuid>` and the older
    `MIG-GPU-<uuid>/<gpu instance>/<compute instance>`; None means all, an empty string none, and a negative index
    ends the list. Indices are in PCI bus order; on a node of mixed models CUDA's own order differs from it
    unless CUDA_DEVICE_ORDER=PCI_BUS_ID is set, so UUIDs are safer there.

    Args:
        some_are_down: skip an entry that matches no GPU, so that one that fell off the bus does not disable the others.

    Raises:
        ConfigError: an entry matches no GPU, more than one, or one that is already listed.
    """
    return choose_gpus(gpus, setting, some_are_down=some_are_down)[0]


def choose_gpus(
    gpus: Sequence[GpuInfo], setting: str | None, *, some_are_down: bool = False
) -> tuple[tuple[GpuInfo, ...], tuple[str, ...]]:
    """`visible_gpus`, and the entries that match no GPU now; a whole UUID may be one of a GPU that is not there.

    Raises:
        ConfigError: as for `visible_gpus`.
    """
    if setting is None:
        return tuple(gpus), ()
    if setting.strip() in {"", _NO_DEVICES}:
        return (), ()
    chosen: list[GpuInfo] = []
    missing: list[str] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.startswith("-") and entry[1:].isdigit():
            break
        try:
            gpu = find_gpu(gpus, entry, "CUDA_VISIBLE_DEVICES")
        except NoSuchGpuError:
            if some_are_down or is_whole_uuid(entry):
                missing.append(entry)
                continue
            raise
        if gpu in chosen:
            raise ConfigError(f"CUDA_VISIBLE_DEVICES: {entry!r} names {gpu.uuid} a second time; list each GPU once")
        chosen.append(gpu)
    return tuple(chosen), tuple(missing)


def is_whole_uuid(entry: str) -> bool:
    """Whether this is a GPU's full UUID: it names a GPU also while that is not there."""
    return _WHOLE_UUID.fullmatch(entry) is not None


def find_gpu(gpus: Sequence[GpuInfo], entry: str, where: str) -> GpuInfo:
    """The one GPU that `entry` names, in any form that `visible_gpus` accepts.

    Args:
        where: the setting that `entry` comes from, for the error text.

    Raises:
        NoSuchGpuError: it matches no GPU.
        ConfigError: it matches more than one, or a board that is partitioned into MIG slices.
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
        raise ConfigError(f"{where}: {entry!r} is partitioned into MIG slices; name a slice: {names}")
    if len(found) > 1:
        raise ConfigError(f"{where}: {entry!r} matches more than one GPU: {names}")
    return found[0]


def _old_mig_name(mig: MigSlice) -> str:
    return f"mig-{mig.board}/{mig.gpu_instance}/{mig.compute_instance}".lower()
