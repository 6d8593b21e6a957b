"""`hardware_json` of a registration (docs/contract.md §1.2), field for field.

CPUs and memory are what tasks can really use: this process's affinity, cgroup quota and cgroup limit. Reads files and
the routing table; sends nothing and resolves no names.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from flowmesh.node.cgroup_limits import CGROUPS, PROC, cpu_quotas, lines, memory_limits_bytes
from flowmesh.node.devices import GpuInfo
from flowmesh.web.own_address import address_towards

# Documentation addresses (RFC 5737, RFC 3849): on no local network, so they follow the default route.
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")


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
    """`hardware_json`."""

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
    proc: Path = PROC,
    cgroups: Path = CGROUPS,
) -> Hardware:
    """The hardware of a node, or of one of its slots.

    Args:
        gpus: the GPUs to register: the slot's.
        driver_version, cuda_version: the node's; None in the result where `gpus` is empty (docs/contract.md §1.2).
        bandwidth_bytes_per_sec: WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC.
        cpus: the slot's number of CPUs, where it is confined to some; None: all that this process may use.
        proc, cgroups: mount points of procfs and of the cgroup hierarchies.
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


def logical_cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """CPUs that this process can keep busy: its affinity, limited by the lowest cgroup quota (rounded down, min 1)."""
    cores = len(os.sched_getaffinity(0))
    return min([cores, *(max(1, int(quota)) for quota in cpu_quotas(proc, cgroups))])


def memory_total_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """The machine's memory, limited by the tightest cgroup limit."""
    total = 0
    for line in lines(proc / "meminfo"):
        name, _, value = line.partition(":")
        if name == "MemTotal":
            total = int(value.split()[0]) * 1024
            break
    return min([total, *memory_limits_bytes(proc, cgroups)])


def cpu_model(proc: Path = PROC) -> str:
    """`model name` in /proc/cpuinfo; on Arm, whose kernels leave it out, the architecture."""
    for line in lines(proc / "cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() in {"model name", "Model"} and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def default_ip() -> str | None:
    """This machine's address on the default route; None without one. Nothing is sent."""
    for elsewhere in _ELSEWHERE:
        with contextlib.suppress(OSError):  # no such route, or no such family
            return address_towards(elsewhere)
    return None
