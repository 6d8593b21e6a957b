"""Reads a deployment's state from Redis: its workers, and the terminal events of tasks. Never writes."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh.cli import locate
from flowmesh.errors import FieldError, FlowMeshError
from flowmesh.messages import wire
from flowmesh.messages.matching import gpus_of, match
from flowmesh.validation.describe import found

if TYPE_CHECKING:
    import redis

TERMINAL = ("TASK_SUCCEEDED", "TASK_FAILED")


class TaskFailed(FlowMeshError):
    """The task ended with TASK_FAILED, or cannot run here."""

    @classmethod
    def of(cls, task_id: str, verdict: Any, error: str | None) -> TaskFailed:
        """The failure of a task; `verdict` is shown if it says more than "error"."""
        kind = f" ({verdict})" if isinstance(verdict, str) and verdict not in ("", "error") else ""
        return cls(f"{task_id} failed{kind}: {error or 'no reason given'}")


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
    disabled: bool
    """Disabled by the orchestrator's elastic scaling."""

    @property
    def gpus(self) -> list[Mapping[str, Any]]:
        """The GPUs in `hardware`."""
        return gpus_of(self.hardware or {})


class TaskEnd(msgspec.Struct, frozen=True, kw_only=True):
    """A terminal event of `tasks.events`."""

    task_id: str
    worker_id: str
    ok: bool
    error: str
    payload: dict[str, Any]


def read_workers(client: redis.Redis) -> list[Worker]:
    """All registered workers, sorted by id."""
    ids = sorted(_text(worker_id) for worker_id in client.smembers(wire.WORKER_IDS))
    pipe = client.pipeline(transaction=False)
    pipe.smembers(wire.DISABLED)
    for worker_id in ids:
        pipe.hgetall(wire.worker_key(worker_id))
        pipe.get(wire.heartbeat_key(worker_id))
        pipe.ttl(wire.heartbeat_key(worker_id))
    disabled, *answers = pipe.execute()
    disabled = {_text(worker_id) for worker_id in disabled}
    now = datetime.datetime.now(datetime.UTC)
    workers = []
    for index, worker_id in enumerate(ids):
        record, beat, ttl = answers[3 * index : 3 * index + 3]
        fields = {_text(name): _text(value) for name, value in record.items()}
        off = worker_id in disabled
        workers.append(_worker(worker_id, fields, beat=_text(beat or b""), ttl=ttl, disabled=off, now=now))
    return workers


def is_alive(client: redis.Redis, worker_id: str) -> bool:
    return bool(client.ttl(wire.heartbeat_key(worker_id)) > 0)


def why_not(worker: Worker, requirements: Mapping[str, Any], task_type: str | None) -> list[str]:
    """The reasons why a worker cannot run a task now; empty if it can.

    Args:
        requirements: the task's `spec.resources.hardware`.

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


@contextlib.contextmanager
def subscribed(client: redis.Redis, *channels: str) -> Iterator[redis.client.PubSub]:
    """A subscription that the server has confirmed: every message published from now on arrives."""
    with client.pubsub() as events:  # type: ignore[no-untyped-call]
        events.subscribe(*channels)
        for _ in channels:
            events.get_message(timeout=locate.TIMEOUT_S)
        yield events


def decode_event(message: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The event in a message of `get_message()`; None if it is no JSON object."""
    if message is None or message["type"] != "message":
        return None
    event: Any
    try:
        event = json.loads(message["data"])
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def terminal_event(event: Mapping[str, Any], task_id: str) -> TaskEnd | None:
    """The outcome of the task, if `event` is its terminal event."""
    if event.get("task_id") != task_id or event.get("type") not in TERMINAL:
        return None
    payload = event.get("payload")
    return TaskEnd(
        task_id=task_id,
        worker_id=str(event.get("worker_id") or ""),
        ok=event["type"] == "TASK_SUCCEEDED",
        error=str(event.get("error") or ""),
        payload=payload if isinstance(payload, dict) else {},
    )


def _worker(
    worker_id: str, fields: dict[str, str], *, beat: str, ttl: int, disabled: bool, now: datetime.datetime
) -> Worker:
    env, tags, hardware = (_json(fields.get(name)) for name in ("env_json", "tags_json", "hardware_json"))
    types = env.get("task_types") if isinstance(env, dict) else None
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
