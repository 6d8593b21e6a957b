"""What a node registers with: docs/contract.md §1.2's `hardware_json`, field for field.

Says what its tasks can really have: the CPUs of our affinity and cgroup quota, the memory of our cgroup limit.
Reads files and one routing table entry; nothing is sent and no name is looked up.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from flowmesh.node.devices import GpuInfo

# Documentation addresses (RFC 5737, RFC 3849): off every local network, so they follow the default route.
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
_ANY_PORT = 9

_V1_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as the largest page-aligned 63-bit number


class Cpu(msgspec.Struct, frozen=True):
    logical_cores: int
    model: str


class Memory(msgspec.Struct, frozen=True):
    total_bytes: int


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    name: str
    uuid: str
    memory_total_bytes: int


class Gpus(msgspec.Struct, frozen=True, kw_only=True):
    driver_version: str | None = None
    cuda_version: str | None = None
    gpus: tuple[Gpu, ...] = ()


class Network(msgspec.Struct, frozen=True):
    ip: str | None
    bandwidth_bytes_per_sec: int | UnsetType = UNSET


class Hardware(msgspec.Struct, frozen=True):
    """`hardware_json`"""

    cpu: Cpu
    memory: Memory
    gpu: Gpus
    network: Network


def collect(
    gpus: Sequence[GpuInfo] = (),
    *,
    driver_version: str | None = None,
    cuda_version: str | None = None,
    bandwidth_bytes_per_sec: int | None = None,
    cpus: int | None = None,
    proc: Path = Path("/proc"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> Hardware:
    """A node's (or a slot's) hardware.

    Args:
        gpus: the GPUs to register; a slot gives its own.
        driver_version, cuda_version: of the node; left out of the result where `gpus` is empty, as the contract has it.
        bandwidth_bytes_per_sec: WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC.
        cpus: a slot's own number of CPUs, where it is confined to some; None: all that this process may use.
        proc, cgroups: where procfs and the cgroup hierarchies are mounted.
    """
    return Hardware(
        cpu=Cpu(logical_cores=logical_cores(proc, cgroups) if cpus is None else cpus, model=cpu_model(proc)),
        memory=Memory(total_bytes=memory_total_bytes(proc, cgroups)),
        gpu=Gpus(
            driver_version=driver_version if gpus else None,
            cuda_version=cuda_version if gpus else None,
            gpus=tuple(
                Gpu(index=gpu.index, name=gpu.name, uuid=gpu.uuid, memory_total_bytes=gpu.memory_total_bytes)
                for gpu in gpus
            ),
        ),
        network=Network(
            ip=default_ip(),
            bandwidth_bytes_per_sec=UNSET if bandwidth_bytes_per_sec is None else bandwidth_bytes_per_sec,
        ),
    )


def logical_cores(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that we can keep busy: our affinity, cut by the tightest cgroup quota above us (rounded down, never 0)."""
    cores = len(os.sched_getaffinity(0))
    for folder in _folders(proc, cgroups, "cpu"):
        quota = _quota_v2(folder) or _quota_v1(folder)
        if quota is not None:
            cores = min(cores, max(1, int(quota)))
    return cores


def memory_total_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """The machine's memory, cut by the tightest cgroup limit above us."""
    total = 0
    for line in _lines(proc / "meminfo"):
        name, _, value = line.partition(":")
        if name == "MemTotal":
            total = int(value.split()[0]) * 1024
            break
    for folder in _folders(proc, cgroups, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _number(folder / name)
            if limit is not None and limit < _V1_UNLIMITED:
                total = min(total, limit)
    return total


def cpu_model(proc: Path = Path("/proc")) -> str:
    """`model name` of /proc/cpuinfo, which Arm kernels leave out: there, the architecture."""
    for line in _lines(proc / "cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() in {"model name", "Model"} and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def default_ip() -> str | None:
    """Our address on the default route; None without one. Connecting a datagram socket asks the routing table only."""
    for family, elsewhere in _ELSEWHERE:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((elsewhere, _ANY_PORT))
                return str(sock.getsockname()[0])
        except OSError:
            continue  # no such route, or no such family
    return None


def _folders(proc: Path, cgroups: Path, controller: str) -> Iterator[Path]:
    """Our cgroup's folder and those above it, in each hierarchy that may limit `controller`.

    A container sees its own cgroup as the mount's root while /proc may still name the host's path; a path that is
    not there therefore means the root.
    """
    for line in _lines(proc / "self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            roots = [cgroups, cgroups / "unified"]
        elif controller in controllers.split(","):
            roots = [cgroups / controllers, cgroups / controller]
        else:
            continue
        for root in roots:
            folder = root / path.lstrip("/")
            if not folder.is_dir():
                folder = root
            while folder != root:
                yield folder
                folder = folder.parent
            yield root


def _quota_v2(folder: Path) -> float | None:
    words = next(_lines(folder / "cpu.max"), "").split()
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return None if not quota or not period else quota / period


def _number(path: Path) -> int | None:
    """The file's number; None where there is none: `max`, -1, no such file."""
    text = next(_lines(path), "").strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, read only as far as they are wanted; none where it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from (line.rstrip("\n") for line in file)
    except OSError:
        return
