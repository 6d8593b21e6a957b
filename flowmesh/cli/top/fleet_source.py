"""The picture of a deployment, from its Redis: the workers' hashes, and the heartbeats that come meanwhile.

It does not subscribe to `tasks.events`: nodes hold events back while nobody listens there, and this is no orchestrator.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh.cli import deployment, locate
from flowmesh.cli.control_types import LogsPlace
from flowmesh.cli.deployment import Worker
from flowmesh.cli.top.picture import Gpu, Picture, Slot, Task, end_of, task_of
from flowmesh.errors import FlowMeshError, UnavailableError
from flowmesh.messages import wire
from flowmesh.queue.names import CONTROL_CHANNEL
from flowmesh.redaction import redact_url

if TYPE_CHECKING:
    import redis

MOST_EVENTS = 1000
"""Taken in at one fetch; the rest waits for the next."""
SHOWN_ENDS = 20


class FleetSource:
    can_follow_logs = False

    def __init__(self, url: str) -> None:
        self._url = url
        self._open = contextlib.ExitStack()
        self._client: redis.Redis | None = None
        self._events: redis.client.PubSub | None = None
        self._heard: dict[str, dict[str, Any]] = {}
        """By worker: the metrics of its last heartbeat, for nodes whose hash has none."""

    def fetch(self) -> Picture:
        """
        Raises:
            UnavailableError: Redis does not answer. The next call connects again.
        """
        import redis

        try:
            client = self._connect()
            self._hear()
            workers = deployment.read_workers(client)
            pipe = client.pipeline(transaction=False)
            for worker in workers:
                pipe.hmget(wire.worker_key(worker.worker_id), "metrics_json", "degraded")
            found = [(worker, *self._live(worker, *row)) for worker, row in zip(workers, pipe.execute(), strict=True)]
        except UnavailableError:
            self.close()
            raise
        except redis.RedisError as error:
            self.close()
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnavailableError(f"Redis at {redact_url(self._url)} does not answer: {reason}") from None
        return _picture(redact_url(self._url), found)

    def cancel(self, task_id: str) -> str:
        """Ask all nodes to cancel the task; returns what to say about it."""
        with locate.connected(self._url) as client:
            message = {"type": "CANCEL", "task_id": task_id, "reason": "cancelled with flowmesh top"}
            heard = client.publish(CONTROL_CHANNEL, json.dumps(message))
        return f"asked {heard} nodes to cancel {task_id}"

    def logs(self, task_id: str) -> LogsPlace:
        raise FlowMeshError(f"logs are on the task's node: run `flowmesh logs {task_id}` there")

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the connection is broken
            self._open.close()
        self._open, self._client, self._events = contextlib.ExitStack(), None, None

    def _connect(self) -> redis.Redis:
        if self._client is None:
            self._client = self._open.enter_context(locate.connected(self._url))
            events = self._open.enter_context(self._client.pubsub())  # type: ignore[no-untyped-call]
            events.subscribe(wire.EVENTS_CHANNEL)
            self._events = events
        return self._client

    def _hear(self) -> None:
        assert self._events is not None
        for _ in range(MOST_EVENTS):
            message = self._events.get_message()
            if message is None:
                return
            event = deployment.decode_event(message) or {}
            if event.get("type") == "HEARTBEAT" and isinstance(event.get("metrics"), dict):
                self._heard[str(event.get("worker_id"))] = event["metrics"]
            elif event.get("type") == "UNREGISTER":
                self._heard.pop(str(event.get("worker_id")), None)

    def _live(self, worker: Worker, metrics: bytes | None, degraded: bytes | None) -> tuple[dict[str, Any], str | None]:
        try:
            found = json.loads(metrics or b"null")
        except (ValueError, RecursionError):
            found = None
        live = found if isinstance(found, dict) else self._heard.get(worker.worker_id, {})
        return live, None if degraded is None else degraded.decode(errors="replace")


def _picture(address: str, found: list[tuple[Worker, dict[str, Any], str | None]]) -> Picture:
    up = [worker for worker, _, _ in found if worker.alive]
    stale = [worker.worker_id for worker, _, _ in found if not worker.alive]
    ends = [end for _, live, _ in found for end in _each(live.get("recent"), end_of)]
    gpus = [gpu for worker, live, _ in found for gpu in _gpus(worker, live)]
    power = [gpu.power_w for gpu in gpus if gpu.power_w is not None]
    costs = [worker.cost_per_hour for worker in up if worker.cost_per_hour is not None]
    waiting = [
        Task(task_id=str(task_id), state="queued", worker_id=worker.worker_id)
        for worker, live, _ in found
        for task_id in _list(live.get("queue"))
    ]
    queued = sum(count for _, live, _ in found if isinstance(count := live.get("queued"), int))
    return Picture(
        of="deployment",
        about=(f"deployment at {address}", f"{len(up)} of {len(found)} workers alive"),
        troubles=(f"no heartbeat from {', '.join(stale[:5])}{' …' if len(stale) > 5 else ''}",) if stale else (),
        gpus=tuple(gpus),
        slots=tuple(_slot(worker, live, degraded) for worker, live, degraded in found),
        running=tuple(task for worker, live, _ in found if (task := _task(worker, live)) is not None),
        queue=tuple(waiting),
        queued=queued,
        deliveries=tuple(
            msgspec.structs.replace(task, worker_id=worker.worker_id, state="delivering")
            for worker, live, _ in found
            for task in _each(live.get("deliveries"), task_of)
        ),
        recent=tuple(sorted(ends, key=lambda end: end.finished_at or "", reverse=True)[:SHOWN_ENDS]),
        power_w=sum(power) if power else None,
        cost_per_hour=sum(costs) if costs else None,
    )


def _slot(worker: Worker, live: dict[str, Any], degraded: str | None) -> Slot:
    load = live.get("loadavg")
    first = load.get("1m") if isinstance(load, dict) else None
    queued = live.get("queued")
    reason = "disabled by the orchestrator's elastic scaling" if worker.disabled else None
    return Slot(
        worker_id=worker.worker_id,
        status=(worker.status or "?") if worker.alive else f"stale ({worker.status or '?'})",
        task_id=worker.task_id,
        gpus=len(worker.gpus),
        reason=degraded or reason,
        cost_per_hour=worker.cost_per_hour,
        queued=queued if isinstance(queued, int) else None,
        seen_s_ago=worker.last_seen_s,
        alive=worker.alive,
        load_1m=float(first) if isinstance(first, int | float) else None,
    )


def _task(worker: Worker, live: dict[str, Any]) -> Task | None:
    """The worker's task: the hash is newer than its heartbeat, and a node of an older version has only that."""
    if not worker.alive or worker.task_id is None:
        return None
    data = live.get("task")
    if isinstance(data, dict) and data.get("task_id") == worker.task_id:
        with contextlib.suppress(msgspec.ValidationError, AttributeError, TypeError):
            return task_of({**data, "worker_id": worker.worker_id})
    return Task(task_id=worker.task_id, worker_id=worker.worker_id, state="running")


def _gpus(worker: Worker, live: dict[str, Any]) -> Iterator[Gpu]:
    """With what its heartbeat says of them; a node of an older version reports power alone, by index."""
    readings = {gpu.uuid: gpu for gpu in _each(live.get("gpus"), lambda data: msgspec.convert(data, Gpu))}
    watts = _watts(live) if worker.alive else {}
    for data in worker.gpus:
        uuid, index = str(data.get("uuid") or ""), data.get("index")
        total = data.get("memory_total_bytes")
        known = readings.get(uuid) if worker.alive else None
        yield msgspec.structs.replace(
            known or Gpu(power_w=watts.get(index)),
            uuid=uuid,
            index=index if isinstance(index, int) else None,
            name=str(data.get("name") or ""),
            worker_id=worker.worker_id,
            memory_total_bytes=total if isinstance(total, int | float) else None,
        )


def _watts(live: dict[str, Any]) -> dict[Any, float]:
    try:
        return {
            each["index"]: float(each["power_w"])
            for each in live["power"]["gpu_watts"]["per_gpu"]
            if each.get("power_w") is not None
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _each(value: Any, make: Any) -> Iterator[Any]:
    """What `make` makes of each item; an item that does not fit is left out."""
    for item in _list(value):
        if isinstance(item, dict):
            with contextlib.suppress(msgspec.ValidationError, AttributeError, TypeError):
                yield make(item)
