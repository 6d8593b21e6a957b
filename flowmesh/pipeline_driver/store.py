"""What a submitted pipeline has done, in Redis: the ends of its stages, where each stands, and the pipeline's end."""

from __future__ import annotations

import datetime
import json
import time
from typing import Any

import msgspec

from flowmesh.client.pipelines import StageState
from flowmesh.client.requests import Request
from flowmesh.messages import wire
from flowmesh.pipeline_driver.job import Job
from flowmesh.pipeline_driver.lease import Lease, Lost
from flowmesh.pipelines.parts import Record
from flowmesh.pipelines.progress import StageRun, State
from flowmesh.queue import names, pipeline_scripts
from flowmesh.queue.records import fields_of
from flowmesh.redaction import Redactor

MOST_BYTES = 1 << 20
"""Of the pipeline's result. Above it, results of stages are left out: each is its task's own result, too."""
WORKER = "queue"
"""The `worker_id` of the pipeline's events: none of the workers, of which an orchestrator keeps count."""


class RedisStore:
    """
    Args:
        redact: hides the document's secrets in errors.
        started_at: when its first driver took it, in ISO 8601.
    """

    def __init__(self, job: Job, lease: Lease, redact: Redactor, started_at: str) -> None:
        self._job = job
        self._lease = lease
        self._redact = redact
        self._started_at = started_at
        self._shown: dict[str, StageState] = {}
        self._began = time.time() - time.monotonic()

    def load(self) -> dict[str, Record]:
        answer = self._lease.ask(self._read)
        found = {}
        for name, value in fields_of(answer).items():
            try:
                found[name] = msgspec.json.decode(value, type=Record)
            except msgspec.DecodeError:
                continue  # of another version: the stage runs again
        return found

    def _read(self) -> Request[Any]:
        (answer,) = yield [("HGETALL", names.pipeline_key(self._job.pipeline_id, "ends"))]
        return answer

    def save(self, *records: Record) -> None:
        """See `Store.save`.

        Raises:
            Lost: another driver has the pipeline.
        """
        pairs: list[Any] = []
        for record in records:
            kept = msgspec.structs.replace(record, error=self._plain(record.error))
            pairs += [record.name, msgspec.json.encode(kept)]
        if not int(self._lease.run(pipeline_scripts.KEEP, *pairs)):
            raise Lost("another driver has the pipeline")

    def show(self, run: StageRun) -> None:
        """Say where a stage stands."""
        state = StageState(
            state=run.state.value,
            task_ids=tuple(part.task_id for part in run.parts),
            merged_into=run.merged_into,
            worker=run.worker,
            started=None if run.started is None else round(run.started + self._began, 3),
            seconds=None if run.seconds is None else round(run.seconds, 3),
            error=self._plain(run.error),
            verdict=run.verdict,
        )
        before = self._shown.get(run.name)
        if state == before or (before is None and run.state is State.WAITING):
            return
        self._shown[run.name] = state
        line = "" if before is not None and before.state == state.state else _line(run.name, state)
        self._lease.run(pipeline_scripts.SHOW, run.name, msgspec.json.encode(state), line)

    def finish(self, summary: dict[str, Any]) -> None:
        """See `Store.finish`; publishes the pipeline's one event."""
        verdict, error = self._outcome(summary)
        self.end(verdict, error, summary)

    def end(self, verdict: str, error: str, summary: dict[str, Any]) -> None:
        """End the pipeline.

        Args:
            verdict: `ok`, or why not.
            error: empty for a success.

        Raises:
            Lost: another driver has it, or it has ended.
        """
        ok, at, error = verdict == "ok", wire.utc_now(), self._plain(error) or ""
        payload: dict[str, Any] = {
            "taskType": pipeline_scripts.TYPE,
            "runtime_sec": _seconds(self._started_at, at),
            "started_at": self._started_at or None,
            "finished_at": at,
        }
        if not ok:
            payload |= {"error_kind": verdict, "retryable": False, "exit": None}
        event = wire.TaskEvent(
            type="TASK_SUCCEEDED" if ok else "TASK_FAILED",
            ts=at,
            worker_id=WORKER,
            task_id=self._job.pipeline_id,
            status="SUCCEEDED" if ok else "FAILED",
            error=msgspec.UNSET if ok else error,
            payload=payload,
        )
        kept = bounded(summary) if self._job.result_ttl_s else b""
        arguments = (at, wire.encode(event), int(ok), verdict, error, kept, self._job.result_ttl_s)
        if not int(self._lease.run(pipeline_scripts.END, *arguments)):
            raise Lost("another driver has the pipeline, or it has ended")

    def _outcome(self, summary: dict[str, Any]) -> tuple[str, str]:
        if self._lease.cancelled:
            return "cancelled", self._lease.cancelled
        if summary["ok"]:
            return "ok", ""
        failed = [(name, stage) for name, stage in summary["stages"].items() if stage["state"] == State.FAILED.value]
        if not failed:
            return "cancelled", "its stages were cancelled"
        name, stage = failed[0]
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return stage.get("verdict") or "error", f"stage {name}{others}: {stage.get('error') or 'no reason given'}"

    def _plain(self, error: str | None) -> str | None:
        return None if error is None else self._redact(error)


def _seconds(began: str, ended: str) -> float:
    try:
        took = datetime.datetime.fromisoformat(ended) - datetime.datetime.fromisoformat(began)
    except (ValueError, TypeError):
        return 0.0
    return round(max(0.0, took.total_seconds()), 3)


def _line(name: str, state: StageState) -> str:
    parts = [f"{name}: {state.state}"]
    if state.merged_into:
        parts.append(f"with {state.merged_into}")
    if state.seconds is not None:
        parts.append(f"after {state.seconds:.1f} s")
    if state.worker:
        parts.append(f"on {state.worker}")
    return " ".join(parts) + (f": {' '.join(state.error.split())[:2000]}" if state.error else "")


def bounded(summary: dict[str, Any]) -> bytes:
    """A pipeline's result as JSON of at most MOST_BYTES; the largest results of stages are left out for that."""
    data = json.dumps(summary, ensure_ascii=False).encode()
    stages = summary.get("stages", {})
    sizes = {name: len(json.dumps(stage.get("result"))) for name, stage in stages.items() if "result" in stage}
    kept = dict(stages)
    left = len(data)
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if left <= MOST_BYTES:
            break
        kept[name] = {key: value for key, value in kept[name].items() if key != "result"} | {"result_omitted": True}
        left -= sizes[name]
    return data if kept == stages else json.dumps({**summary, "stages": kept}, ensure_ascii=False).encode()
