"""Registered workers, as their records in Redis describe them, and which of them a task fits."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from flowmesh.errors import BusyError, ConfigError, FieldError, FlowMeshError
from flowmesh.messages import wire
from flowmesh.messages.matching import gpus_of, match
from flowmesh.messages.nodes import ONE, Nodes
from flowmesh.queue.classes import RequirementClass, tags_of
from flowmesh.validation.describe import found


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """A registered worker. Fields that its record lacks, or that cannot be parsed, are None or empty."""

    worker_id: str
    status: str
    task_id: str | None
    last_task: str | None
    hardware: dict[str, Any] | None
    task_types: tuple[str, ...] | None
    """None: not reported; it may accept any."""
    tags: tuple[str, ...]
    cost_per_hour: float | None
    started_at: str | None
    last_seen_s: float | None
    """Seconds since its last heartbeat."""
    alive: bool
    """Its heartbeat key exists and has a TTL."""
    node: str = ""
    """The id of its node; empty: not reported, and it takes no part in tasks on several nodes."""
    drives_pipelines: bool
    """Its node drives submitted pipelines."""
    disabled: bool
    """Disabled by the orchestrator's elastic scaling."""

    @property
    def gpus(self) -> list[Mapping[str, Any]]:
        """The GPUs in `hardware`."""
        return gpus_of(self.hardware or {})


def ids_of(members: Iterable[Any]) -> list[str]:
    """The ids in `workers:ids`, sorted."""
    return sorted(_text(worker_id) for worker_id in members)


def reads(ids: Sequence[str]) -> list[tuple[str, ...]]:
    """The commands whose answers `workers_of` reads."""
    commands: list[tuple[str, ...]] = [("SMEMBERS", wire.DISABLED)]
    for worker_id in ids:
        commands += [
            ("HGETALL", wire.worker_key(worker_id)),
            ("GET", wire.heartbeat_key(worker_id)),
            ("TTL", wire.heartbeat_key(worker_id)),
        ]
    return commands


def workers_of(ids: Sequence[str], answers: Sequence[Any]) -> list[Worker]:
    """The workers of these ids, from the answers to `reads`."""
    disabled = {_text(worker_id) for worker_id in answers[0]}
    now = datetime.datetime.now(datetime.UTC)
    workers = []
    for index, worker_id in enumerate(ids):
        record, beat, ttl = answers[1 + 3 * index : 4 + 3 * index]
        fields = {_text(name): _text(value) for name, value in record.items()}
        off = worker_id in disabled
        workers.append(_worker(worker_id, fields, beat=_text(beat or b""), ttl=ttl, disabled=off, now=now))
    return workers


def why_not(
    worker: Worker, requirements: Mapping[str, Any], task_type: str | None, tags: Sequence[str] = ()
) -> list[str]:
    """The reasons why a worker cannot run a task now; empty if it can.

    Args:
        requirements: the task's `spec.resources.hardware`.
        tags: its `spec.resources.tags`.

    Raises:
        FieldError: a requirement cannot be parsed.
    """
    if not worker.alive:
        return ["stale: no heartbeat" + (f" for {worker.last_seen_s:.0f} s" if worker.last_seen_s is not None else "")]
    reasons = []
    if worker.status != "IDLE":
        task = f" ({worker.task_id})" if worker.task_id else ""
        reasons.append(f"is {worker.status or 'in an unknown state'}{task}")
    if worker.disabled:
        reasons.append("disabled by the orchestrator's elastic scaling")
    if task_type is not None and worker.task_types is not None and task_type not in worker.task_types:
        offered = ", ".join(worker.task_types) or "nothing"
        reasons.append(f"does not offer {task_type} (offers {offered})")
    if missing := [tag for tag in tags if tag not in worker.tags]:
        reasons.append(f"lacks the tag {missing[0]!r}")
    if worker.hardware is None and requirements:
        reasons.append("reports no valid hardware description")
    else:
        reasons += match(worker.hardware or {}, requirements)
    return reasons


def requirements_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document's `spec.resources.hardware`.

    Raises:
        FieldError: it is not a mapping.
    """
    place: Any = document.get("spec")
    path = "spec"
    for name in ("resources", "hardware"):
        place, path = place.get(name), f"{path}.{name}"
        if place is None:
            return {}
        if not isinstance(place, dict):
            raise FieldError(f"{path}: expected a mapping, found {found(place)}", path)
    hardware: dict[str, Any] = place
    return hardware


def type_of(document: Mapping[str, Any]) -> str | None:
    """A document's `spec.taskType`, if it is a text."""
    kind = document["spec"].get("taskType")
    return kind if isinstance(kind, str) else None


def choose(workers: list[Worker], document: Mapping[str, Any], worker_id: str | None = None) -> Worker:
    """Choose the worker for a task: the one named, else the cheapest that fits.

    Raises:
        ConfigError: no worker of that name is registered.
        NoWorkerFits: no worker can run it now; has the reason for each.
        BusyError: no worker is registered at all.
    """
    if worker_id is not None:
        known = ", ".join(worker.worker_id for worker in workers) or "none"
        workers = [worker for worker in workers if worker.worker_id == worker_id]
        if not workers:
            raise ConfigError(f"--worker: {worker_id!r} is not registered; registered: {known}")
    if not workers:
        raise BusyError("no worker is registered in this Redis: start a node, or check --redis")
    required = requirements_of(document)
    task_type, tags = type_of(document), tags_of(document["spec"].get("resources") or {})
    reasons = {worker.worker_id: why_not(worker, required, task_type, tags) for worker in workers}
    fitting = [worker for worker in workers if not reasons[worker.worker_id]]
    if not fitting:
        raise NoWorkerFits({name: "; ".join(why) for name, why in reasons.items()})
    return min(fitting, key=_preference)


def _preference(worker: Worker) -> tuple[float, int, str]:
    """The cheapest worker first; of equal ones that with the fewest GPUs, to leave larger ones free."""
    cost = worker.cost_per_hour if worker.cost_per_hour is not None else float("inf")
    return cost, len(worker.gpus), worker.worker_id


class NoWorkerFits(BusyError):
    """No registered worker can run the task now."""

    def __init__(self, reasons: dict[str, str]) -> None:
        count = len(reasons)
        super().__init__(
            f"none of the {count} workers can run this task now" if count > 1 else "the worker cannot run this task now"
        )
        self.reasons = reasons


class NeverFits(FlowMeshError):
    """No registered worker could ever take the task, however long it waits."""

    def __init__(self, reasons: dict[str, str], what: str = "this task") -> None:
        told = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:5]) or "no worker is registered"
        super().__init__(
            f"no registered worker could ever run {what} ({told}); change what it asks for, start a node that has "
            "it, or queue it nevertheless (--anyway)"
        )
        self.reasons = reasons


def nodes_that_fit(workers: Iterable[Worker], wanted: RequirementClass) -> set[str]:
    """The nodes with a living worker that could take a task of this class; those that know no gangs are left out."""
    return {
        worker.node
        for worker in workers
        if worker.alive
        and worker.node
        and not worker.disabled
        and not wanted.why_not(worker.hardware or {}, worker.task_types, worker.tags)
    }


class TooFewNodes(NeverFits):
    """The task asks for more nodes than there are that fit it."""

    def __init__(self, found: list[str], nodes: Nodes, what: str) -> None:
        FlowMeshError.__init__(
            self,
            f"spec.nodes: {what} needs {nodes.least} nodes that fit it, and there are {len(found)} "
            f"({', '.join(found[:5])}); ask for fewer, start more nodes, or queue it nevertheless (--anyway)",
        )
        self.reasons = {}


def refuse_unless_possible(
    workers: Iterable[Worker], wanted: RequirementClass, what: str = "this task", nodes: Nodes = ONE
) -> None:
    """Check that living workers could take a task of this class, however busy they are now.

    Args:
        what: for the error.
        nodes: on how many nodes it runs.

    Raises:
        NeverFits: none could, or too few; has the reason for each.
    """
    workers = list(workers)
    if nodes.is_gang and 0 < len(found := nodes_that_fit(workers, wanted)) < nodes.least:
        raise TooFewNodes(sorted(found), nodes, what)
    reasons = {}
    for worker in workers:
        if not worker.alive:
            continue
        why = wanted.why_not(worker.hardware or {}, worker.task_types, worker.tags)
        if not why and (worker.node or not nodes.is_gang):
            return
        why = why or ["its node takes no part in tasks on several nodes"]
        reasons[worker.worker_id] = "; ".join(why)
    raise NeverFits(reasons, what)


def fits_elsewhere(workers: Iterable[Worker], wanted: RequirementClass, own: Iterable[str]) -> bool:
    """Whether a living worker that is none of `own`, and takes tasks at all, could take a task of this class."""
    mine = set(own)
    return any(
        worker.alive and not worker.disabled and worker.status in ("IDLE", "RUNNING")
        for worker in workers
        if worker.worker_id not in mine and not wanted.why_not(worker.hardware or {}, worker.task_types, worker.tags)
    )


def _worker(
    worker_id: str, fields: dict[str, str], *, beat: str, ttl: int, disabled: bool, now: datetime.datetime
) -> Worker:
    env, tags, hardware = (_json(fields.get(name)) for name in ("env_json", "tags_json", "hardware_json"))
    types = env.get("task_types") if isinstance(env, dict) else None
    drives = isinstance(env, dict) and bool(env.get("pipelines"))
    node = env.get("node") if isinstance(env, dict) else None
    seen = _moment(beat) or _moment(fields.get("last_seen", ""))
    status = fields.get("status", "")
    cost = fields.get("cost_per_hour", "")
    return Worker(
        worker_id=worker_id,
        status=status,
        task_id=(fields.get("extra_task_id") or None) if status not in ("IDLE", "STARTING") else None,
        last_task=fields.get("extra_last_task") or None,
        hardware=hardware if isinstance(hardware, dict) else None,
        task_types=tuple(map(str, types)) if isinstance(types, list | dict) else None,
        tags=tuple(map(str, tags)) if isinstance(tags, list) else (),
        cost_per_hour=float(cost) if cost.replace(".", "", 1).isdigit() else None,
        started_at=fields.get("started_at") or None,
        last_seen_s=max(0.0, (now - seen).total_seconds()) if seen is not None else None,
        alive=ttl > 0,
        node=node if isinstance(node, str) else "",
        drives_pipelines=drives,
        disabled=disabled,
    )


def _moment(text: str) -> datetime.datetime | None:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC)


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
