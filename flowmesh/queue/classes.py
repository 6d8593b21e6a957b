"""Requirement classes: tasks that ask for the same share one. Equal needs, written differently, are one class."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from flowmesh.errors import FieldError
from flowmesh.messages.matching import WHERE, match, parse_bytes, parse_cores
from flowmesh.messages.wire import HardwareWanted
from flowmesh.validation.convert import convert
from flowmesh.validation.describe import found

MAX_TAGS = 32


class RequirementClass(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker must have for the tasks of one class. A field that is absent asks for nothing."""

    task_type: str = ""
    cpu: float = 0
    """Cores."""
    memory: int = 0
    """Bytes, of the machine."""
    gpus: int = 0
    gpu_type: str = ""
    """A part of the GPU's name, in lower case; empty: any."""
    gpu_memory: int = 0
    """Bytes, of each GPU."""
    tags: tuple[str, ...] = ()

    @property
    def member(self) -> str:
        """Canonical JSON: its name in the set of classes."""
        return msgspec.json.encode(self, order="deterministic").decode()

    @property
    def key(self) -> str:
        """Short and unique: part of the names of its keys."""
        return _key(self.member)

    @property
    def hardware(self) -> dict[str, Any]:
        """As `spec.resources.hardware` writes it."""
        wanted: dict[str, Any] = {}
        if self.cpu:
            wanted["cpu"] = self.cpu
        if self.memory:
            wanted["memory"] = self.memory
        if self.gpus:
            gpu = {"count": self.gpus, "type": self.gpu_type or None, "memory": self.gpu_memory or None}
            wanted["gpu"] = {name: value for name, value in gpu.items() if value is not None}
        return wanted

    def why_not(
        self, hardware: Mapping[str, Any], task_types: Iterable[str] | None, worker_tags: Iterable[str]
    ) -> list[str]:
        """The reasons why a worker can never take a task of this class; empty if it can.

        Args:
            hardware: the worker's `hardware_json`.
            task_types: what it offers; None: it does not say.
            worker_tags: its tags.
        """
        reasons = []
        types = None if task_types is None else list(task_types)
        if self.task_type and types is not None and self.task_type not in types:
            reasons.append(f"does not offer {self.task_type} (offers {', '.join(types) or 'nothing'})")
        if missing := [tag for tag in self.tags if tag not in set(worker_tags)]:
            reasons.append(f"lacks the tag {missing[0]!r}")
        return reasons + match(hardware, self.hardware)


@functools.lru_cache(maxsize=4096)
def _key(member: str) -> str:
    return hashlib.sha1(member.encode(), usedforsecurity=False).hexdigest()[:16]  # as the scripts compute it


@functools.lru_cache(maxsize=4096)
def parse(member: str) -> RequirementClass | None:
    """The class of a member of the set; None for one that this version cannot read."""
    try:
        return msgspec.json.decode(member, type=RequirementClass)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def class_of(document: Mapping[str, Any]) -> RequirementClass:
    """The class of a task document.

    Raises:
        FieldError: `spec.resources` cannot be read; names the field.
    """
    spec = document.get("spec")
    spec = spec if isinstance(spec, Mapping) else {}
    task_type = spec.get("taskType")
    resources = spec.get("resources") or {}
    if not isinstance(resources, Mapping):
        raise FieldError(f"spec.resources: expected a mapping, found {found(resources)}", "spec.resources")
    hardware = resources.get("hardware") or {}
    if not isinstance(hardware, Mapping):
        raise FieldError(f"{WHERE}: expected a mapping, found {found(hardware)}", WHERE)
    wanted = convert(dict(hardware), HardwareWanted, where=WHERE)
    gpus, gpu_type, gpu_memory = 0, "", 0
    if wanted.gpu is not None:
        gpu_type = (wanted.gpu.type or "").strip().lower()
        gpu_memory = 0 if wanted.gpu.memory is None else parse_bytes(wanted.gpu.memory, f"{WHERE}.gpu.memory")
        named = wanted.gpu.type is not None or wanted.gpu.memory is not None
        gpus = wanted.gpu.count if wanted.gpu.count is not None else int(named)
    return RequirementClass(
        task_type=task_type if isinstance(task_type, str) else "",
        cpu=0 if wanted.cpu is None else parse_cores(wanted.cpu, f"{WHERE}.cpu"),
        memory=0 if wanted.memory is None else parse_bytes(wanted.memory, f"{WHERE}.memory"),
        gpus=gpus,
        gpu_type="" if gpu_type == "any" or not gpus else gpu_type,
        gpu_memory=gpu_memory if gpus else 0,
        tags=tags_of(resources),
    )


def tags_of(resources: Mapping[str, Any]) -> tuple[str, ...]:
    """`spec.resources.tags`, sorted: the tags that a worker must have.

    Raises:
        FieldError: it is not a list of texts.
    """
    tags = resources.get("tags") or ()
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) and tag for tag in tags):
        raise FieldError("spec.resources.tags: expected a list of texts, such as [nvlink]", "spec.resources.tags")
    if len(tags) > MAX_TAGS:
        raise FieldError(f"spec.resources.tags: at most {MAX_TAGS} (found {len(tags)})", "spec.resources.tags")
    return tuple(sorted(set(tags)))


def owner_of(document: Mapping[str, Any]) -> str:
    """`metadata.owner`, cut to 128 characters: whom the queue is fair between; empty: nobody is named."""
    metadata = document.get("metadata")
    owner = metadata.get("owner") if isinstance(metadata, Mapping) else None
    return str(owner)[:128] if isinstance(owner, str | int) else ""
