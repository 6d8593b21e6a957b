"""The contract's messages and keys on Redis, as structs: dispatches from the orchestrator, and the node's events.

Decoding has two steps. `address()` decodes only which worker a message is for, so that messages for other workers are
cheap; `TaskMessage` is decoded by the worker that it names.
"""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from flowmesh.errors import FieldError
from flowmesh.messages import damaged
from flowmesh.messages.nodes import Count, Gang, NodeRange
from flowmesh.messages.text import encode_json
from flowmesh.messages.trace import Context, parent_of

EVENTS_CHANNEL = "workers.events"
TASK_EVENTS_CHANNEL = "tasks.events"
DISABLED = "workers:elastic_disabled"
"""The set of the ids of workers that the orchestrator does not schedule on."""
WORKER_IDS = "workers:ids"

RECORDS_LANE = "flowmesh:records"
"""The outbox's channel for events of tasks that have a record in Redis: a script publishes them; see queue.reports."""

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""A larger dispatch is refused. Data of that size belongs in a file or behind a URL."""

MAX_TIMEOUT_S = 366 * 86400.0
"""The longest `spec.timeoutSec`."""

TASK_ID = re.compile(r"[A-Za-z0-9_=@+][A-Za-z0-9._:@=+-]{0,199}", re.ASCII)
"""Valid task ids: a task id names a folder on disk and is part of URLs."""


def utc_now() -> str:
    """The current time in the format of all records: ISO 8601, UTC, microseconds."""
    return datetime.datetime.now(datetime.UTC).isoformat()


def worker_key(worker_id: str) -> str:
    """The hash of a worker's registration."""
    return f"worker:{worker_id}"


def heartbeat_key(worker_id: str) -> str:
    """The key that expires when heartbeats stop."""
    return f"worker:{worker_id}:hb"


def heartbeat_ttl_s(interval_s: float) -> int:
    """Its TTL: four heartbeat intervals, at least 120 s."""
    return max(int(4 * interval_s), 120)


class Address(msgspec.Struct, frozen=True):
    """Only the fields that name the worker a message is for, and those that a refusal needs."""

    assigned_worker: Any = None
    task_id: Any = None
    dispatched_at: Any = None
    record: Any = None


class MergedChild(msgspec.Struct, frozen=True, kw_only=True):
    """One of the tasks that the orchestrator merged into a dispatch."""

    task_id: str
    spec: dict[str, Any]
    metadata: dict[str, Any] | None = None


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """The submitted task. The runner gets the document as it was received, unknown fields included."""

    spec: dict[str, Any]
    apiVersion: str | None = None
    kind: str | None = None
    metadata: dict[str, Any] | None = None


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """Which attempt of a task with a record in Redis a dispatch is."""

    attempt: Annotated[int, Meta(ge=1)]
    priority: str = ""
    """Of a queued task; empty: it was dispatched directly."""
    gang: Gang | None = None
    """Which member it is of a task on several nodes; None: of a task on one node."""


class TaskMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A dispatch on the `tasks` channel."""

    task_id: str
    task: Document
    assigned_worker: str
    task_type: str | None = None
    dispatched_at: str | None = None
    parent_task_id: str | None = None
    merged_children: list[MergedChild] | None = None
    shard_index: int | None = None
    shard_total: int | None = None
    record: Recorded | None = None
    traceparent: Any = None
    """The span that the task belongs to; a malformed one is ignored."""
    tracestate: Any = None

    @property
    def rank(self) -> int:
        """Which member of a task on several nodes it is; 0 also for a task on one node."""
        return self.record.gang.rank if self.record is not None and self.record.gang is not None else 0

    @property
    def parent(self) -> tuple[Context | None, str]:
        """The span that the task belongs to, and what is wrong with the one that is named; see `trace.parent_of`."""
        return parent_of(self.traceparent, self.tracestate, self.task.metadata)


class HardwareGpu(msgspec.Struct, frozen=True):
    """`spec.resources.hardware.gpu`: the orchestrator matches it; `count` also limits the GPUs that the task sees."""

    count: Annotated[int, Meta(ge=0)] | None = None
    type: str | None = None
    memory: str | int | None = None


class HardwareWanted(msgspec.Struct, frozen=True):
    """`spec.resources.hardware`."""

    cpu: str | int | float | None = None
    memory: str | int | None = None
    gpu: HardwareGpu | None = None


class Resources(msgspec.Struct, frozen=True):
    """`spec.resources`."""

    hardware: HardwareWanted | None = None
    tags: tuple[str, ...] = ()
    """Tags that a worker must have."""


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `spec` that the node itself reads, for every task type."""

    taskType: str
    resources: Resources | None = None
    nodes: Count | NodeRange | None = None
    output: Any = None
    timeoutSec: Annotated[float, Meta(gt=0)] | None = None
    retainLogs: bool = True
    env: dict[str, str] = {}


MOST_LEVELS = 500
"""What every part of the node and of its children can take; decoders alone would take about twice that."""
TOO_DEEP = f"the message is nested too deep; keep documents below {MOST_LEVELS} levels, and put deeper data into a file"

_address_decoder = msgspec.json.Decoder(Address)
_message_decoder = msgspec.json.Decoder(dict[str, Any])


def address(data: bytes) -> Address:
    """Which worker a message is for.

    Raises:
        FieldError: the message is not a JSON object.
    """
    try:
        return _address_decoder.decode(data)
    except msgspec.ValidationError:
        raise FieldError("the message is not a JSON object", "") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FieldError(f"the message is not JSON: {damaged.cause(data, str(error))}", "") from None
    except RecursionError:
        raise FieldError(TOO_DEEP, "") from None


def recorded_in(value: Any) -> Recorded | None:
    """The `record` of an address; None where there is none that can be read."""
    try:
        return msgspec.convert(value, Recorded)
    except msgspec.ValidationError:
        return None


def salvaged_address(data: bytes) -> Address:
    """Which worker a message is for that `address` refused; fields that cannot be found are None.

    The message cannot run, but its worker must answer for it.
    """
    return Address(**damaged.top_level_strings(data, frozenset(Address.__struct_fields__)))


def decode_object(data: bytes) -> dict[str, Any]:
    """The whole message as plain data.

    Raises:
        FieldError: the message is not a JSON object, or is nested too deep.
    """
    try:
        decoded = _message_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FieldError(f"the message is not a JSON object: {damaged.cause(data, str(error))}", "") from None
    except RecursionError:
        raise FieldError(TOO_DEEP, "") from None
    if data.count(b"[") + data.count(b"{") > MOST_LEVELS and _is_deeper(decoded, MOST_LEVELS):
        raise FieldError(TOO_DEEP, "")
    return decoded


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether JSON data has more than `levels` levels; `value` itself is the first."""
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def usable_task_id(value: Any) -> str | None:
    """`value` if it is a valid task id, else None."""
    return value if isinstance(value, str) and TASK_ID.fullmatch(value) else None


class WorkerEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A message on `workers.events`."""

    type: str
    ts: str
    worker_id: str
    status: str | UnsetType = UNSET
    tags: tuple[str, ...] | UnsetType = UNSET
    metrics: dict[str, Any] = {}
    payload: dict[str, Any] = {}


class TaskEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A message on `tasks.events`."""

    type: str
    ts: str
    worker_id: str
    task_id: str
    status: str | UnsetType = UNSET
    error: str | UnsetType = UNSET
    payload: dict[str, Any] = {}


def encode(message: msgspec.Struct | dict[str, Any]) -> bytes:
    return encode_json(message)
