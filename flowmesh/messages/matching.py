"""Matches a task's hardware requirements against a worker's hardware, with the reasons for a mismatch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flowmesh.errors import FieldError
from flowmesh.messages.wire import HardwareGpu, HardwareWanted
from flowmesh.validation.convert import convert

WHERE = "spec.resources.hardware"

LEAST_BYTES = 1 << 20
"""Less is no size of memory that a task asks for."""

_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGTP]?)(i?)[bB]?\s*", re.ASCII)
_CORES = re.compile(r"\s*(\d+(?:\.\d+)?)(m?)\s*", re.ASCII)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def match(hardware: Mapping[str, Any], requirements: Mapping[str, Any]) -> list[str]:
    """The reasons why a worker does not fit; empty if it does.

    Args:
        hardware: a worker's `hardware_json`. Hardware that it does not report counts as missing.
        requirements: a task's `spec.resources.hardware`.

    Raises:
        FieldError: a requirement cannot be parsed; names its field.
    """
    required = convert(dict(requirements), HardwareWanted, where=WHERE)
    reasons = []
    if required.cpu is not None:
        cores, has = parse_cores(required.cpu, f"{WHERE}.cpu"), _number(hardware, "cpu", "logical_cores")
        if has < cores:
            reasons.append(f"{_count(has, 'core')}, needs {cores:g}")
    if required.memory is not None:
        memory, has = parse_bytes(required.memory, f"{WHERE}.memory"), _number(hardware, "memory", "total_bytes")
        if has < memory:
            reasons.append(f"{_gib(has)} of memory, needs {_gib(memory)}")
    if required.gpu is not None:
        reasons += _match_gpus(hardware, required.gpu)
    return reasons


def _match_gpus(hardware: Mapping[str, Any], required: HardwareGpu) -> list[str]:
    kind = (required.type or "any").strip().lower()
    memory = 0 if required.memory is None else parse_bytes(required.memory, f"{WHERE}.gpu.memory")
    named = required.type is not None or required.memory is not None
    count = required.count if required.count is not None else int(named)
    if count == 0:
        return []
    gpus = gpus_of(hardware)
    of_kind = [gpu for gpu in gpus if kind == "any" or kind in str(gpu.get("name", "")).lower()]
    fitting = [gpu for gpu in of_kind if _as_number(gpu.get("memory_total_bytes")) >= memory]
    if len(fitting) >= count:
        return []
    if len(gpus) < count:
        return [f"{_count(len(gpus), 'GPU')}, needs {count}"]
    if len(of_kind) < count:
        names = ", ".join(sorted({str(gpu.get("name", "unnamed")) for gpu in gpus}))
        return [f"{_count(len(of_kind), 'GPU')} of the type {required.type!r}, needs {count} (has {names})"]
    most = max(_as_number(gpu.get("memory_total_bytes")) for gpu in of_kind)
    return [f"{_count(len(fitting), 'GPU')} with {_gib(memory)}, needs {count} (the largest has {_gib(most)})"]


def parse_bytes(value: str | int, field: str) -> int:
    """A memory size in bytes, from "64Gi" (2^30), "64G" or "64GB" (10^9), or plain bytes.

    Raises:
        FieldError: the value has another form, or is a number without a unit that is no size of memory in bytes: it
            was meant in another unit, and everything would fit it.
    """
    found = _QUANTITY.fullmatch(str(value))
    if found is None or (found[3] and not found[2]):
        raise FieldError(f"{field}: invalid size {value!r}; write it as 64Gi, 64GB or in bytes", field)
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** _POWER[found[2].upper()])
    if not found[2] and 0 < float(found[1]) < LEAST_BYTES:
        number = found[1]
        raise FieldError(f"{field}: {value!r} is {number} bytes; with a unit it is {number}Gi or {number}GB", field)
    return size


def parse_cores(value: str | float, field: str) -> float:
    """A number of cores, from "16", 16, "0.5" or "500m" (millicores).

    Raises:
        FieldError: the value has another form.
    """
    found = _CORES.fullmatch(str(value))
    if found is None:
        raise FieldError(f"{field}: invalid number of cores {value!r}; write it as 16 or 500m", field)
    return float(found[1]) / (1000 if found[2] else 1)


def gpus_of(hardware: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The GPUs in a worker's `hardware_json`."""
    gpu = hardware.get("gpu")
    gpus = gpu.get("gpus") if isinstance(gpu, Mapping) else None
    return [item for item in gpus if isinstance(item, Mapping)] if isinstance(gpus, list) else []


def _number(hardware: Mapping[str, Any], part: str, name: str) -> float:
    section = hardware.get(part)
    return _as_number(section.get(name)) if isinstance(section, Mapping) else 0.0


def _as_number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}" if number == 1 else f"{number:g} {what}s" if number else f"no {what}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB".replace(".0 GiB", " GiB")
