"""Whether a worker's hardware holds what a task wants (docs/contract.md §1.1 and §1.2), and if not, why not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flowmesh.errors import FieldError
from flowmesh.messages.checking import convert
from flowmesh.messages.wire import HardwareGpu, HardwareWanted

WHERE = "spec.resources.hardware"

_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGTP]?)(i?)[bB]?\s*", re.ASCII)
_CORES = re.compile(r"\s*(\d+(?:\.\d+)?)(m?)\s*", re.ASCII)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def match(hardware: Mapping[str, Any], requirements: Mapping[str, Any]) -> list[str]:
    """Why a worker does not fit; empty where it does.

    Args:
        hardware: a worker's `hardware_json`. What it does not tell counts as not there.
        requirements: a task's `spec.resources.hardware`.

    Raises:
        FieldError: a requirement cannot be read; names its field.
    """
    wanted = convert(dict(requirements), HardwareWanted, where=WHERE)
    reasons = []
    if wanted.cpu is not None:
        cores, has = parse_cores(wanted.cpu, f"{WHERE}.cpu"), _number(hardware, "cpu", "logical_cores")
        if has < cores:
            reasons.append(f"{_count(has, 'core')}, needs {cores:g}")
    if wanted.memory is not None:
        memory, has = parse_bytes(wanted.memory, f"{WHERE}.memory"), _number(hardware, "memory", "total_bytes")
        if has < memory:
            reasons.append(f"{_gib(has)} of memory, needs {_gib(memory)}")
    if wanted.gpu is not None:
        reasons += _match_gpus(hardware, wanted.gpu)
    return reasons


def _match_gpus(hardware: Mapping[str, Any], wanted: HardwareGpu) -> list[str]:
    kind = (wanted.type or "any").strip().lower()
    memory = 0 if wanted.memory is None else parse_bytes(wanted.memory, f"{WHERE}.gpu.memory")
    named = wanted.type is not None or wanted.memory is not None
    count = wanted.count if wanted.count is not None else int(named)
    if count == 0:
        return []
    gpus = _gpus(hardware)
    of_kind = [gpu for gpu in gpus if kind == "any" or kind in str(gpu.get("name", "")).lower()]
    fitting = [gpu for gpu in of_kind if _as_number(gpu.get("memory_total_bytes")) >= memory]
    if len(fitting) >= count:
        return []
    if len(gpus) < count:
        return [f"{_count(len(gpus), 'GPU')}, needs {count}"]
    if len(of_kind) < count:
        names = ", ".join(sorted({str(gpu.get("name", "unnamed")) for gpu in gpus}))
        return [f"{_count(len(of_kind), 'GPU')} of the type {wanted.type!r}, needs {count} (has {names})"]
    most = max(_as_number(gpu.get("memory_total_bytes")) for gpu in of_kind)
    return [f"{_count(len(fitting), 'GPU')} with {_gib(memory)}, needs {count} (the largest has {_gib(most)})"]


def parse_bytes(value: str | int, field: str) -> int:
    """A quantity of memory: "64Gi" (2^30), "64G" or "64GB" (10^9), or plain bytes.

    Raises:
        FieldError: it is none of these.
    """
    found = _QUANTITY.fullmatch(str(value))
    if found is None or (found[3] and not found[2]):
        raise FieldError(f"{field}: {value!r} is no size: write it as 64Gi, 64GB or in bytes", field)
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _POWER[found[2].upper()])


def parse_cores(value: str | float, field: str) -> float:
    """A number of cores: "16", 16, "0.5" or "500m".

    Raises:
        FieldError: it is none of these.
    """
    found = _CORES.fullmatch(str(value))
    if found is None:
        raise FieldError(f"{field}: {value!r} is no number of cores: write it as 16", field)
    return float(found[1]) / (1000 if found[2] else 1)


def _gpus(hardware: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    gpu = hardware.get("gpu")
    gpus = gpu.get("gpus") if isinstance(gpu, Mapping) else None
    return [each for each in gpus if isinstance(each, Mapping)] if isinstance(gpus, list) else []


def _number(hardware: Mapping[str, Any], part: str, name: str) -> float:
    section = hardware.get(part)
    return _as_number(section.get(name)) if isinstance(section, Mapping) else 0.0


def _as_number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}" if number == 1 else f"{number:g} {what}s" if number else f"no {what}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB".replace(".0 GiB", " GiB")
