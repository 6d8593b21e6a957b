"""Where each stage of a run stands."""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from flowmesh.pipelines.document import Pipeline, Stage
from flowmesh.pipelines.parts import Part, Record
from flowmesh.pipelines.ports import Ended


class State(enum.StrEnum):
    WAITING = "waiting"
    """For stages that it depends on."""
    READY = "ready"
    """For a slot."""
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    REUSED = "reused"
    """It succeeded in an earlier run with the same id, and nothing that it depends on has changed."""
    SKIPPED = "skipped"
    """Its `when` is false."""
    FAILED = "failed"
    BLOCKED = "not run"
    """A stage that it depends on did not succeed."""
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self not in (State.WAITING, State.READY, State.RUNNING)

    @property
    def lets_others_run(self) -> bool:
        return self in (State.SUCCEEDED, State.REUSED, State.SKIPPED)


class StageRun(msgspec.Struct, kw_only=True):
    """One stage in this run."""

    stage: Stage
    state: State = State.WAITING
    parts: list[Part] = []
    ends: dict[str, Ended] = {}
    """By task id."""
    key: str = ""
    run: str = ""
    """The id of the run whose result it has."""
    result: dict[str, Any] | None = None
    error: str | None = None
    verdict: str | None = None
    out_dir: str | None = None
    worker: str | None = None
    seen: str = ""
    """What its task reports."""
    fraction: float | None = None
    merged_into: str | None = None
    """The stage whose task runs it."""
    started: float | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        return self.stage.name

    def begin(self) -> None:
        self.state = State.RUNNING
        self.started = self.started or time.monotonic()

    def end(self, state: State, error: str | None = None, verdict: str | None = None) -> None:
        self.state, self.error, self.verdict = state, error, verdict
        self.seen, self.fraction = "", None
        if self.started is not None:
            self.seconds = time.monotonic() - self.started

    def as_record(self) -> Record:
        return Record(
            name=self.name,
            key=self.key,
            run=self.run,
            ok=self.state is State.SUCCEEDED,
            task_ids=tuple(part.task_id for part in self.parts),
            result=self.result,
            error=self.error,
            verdict=self.verdict,
            out_dir=self.out_dir,
            worker=self.worker,
        )


def results_of(pipeline: Pipeline, runs: Mapping[str, StageRun], stage: Stage) -> dict[str, Any]:
    """What references in a stage may see: by stage, its result. A `foreach` has one result with all of `each`."""
    results = {name: _seen_result(run) for name, run in runs.items() if run.result is not None}
    for group, names in pipeline.groups.items():
        if group in stage.aliases:
            if stage.aliases[group] in results:
                results[group] = results[stage.aliases[group]]
        elif names != (group,):
            each = [
                {"name": name, "with": runs[name].stage.each, "result": runs[name].result}
                for name in names
                if runs[name].result is not None
            ]
            results[group] = {"ok": True, "each": each}
    return results


def _seen_result(run: StageRun) -> dict[str, Any]:
    """A stage's result, with its task's id and folder where the result itself has no such fields."""
    more: dict[str, Any] = {"task_id": run.parts[0].task_id} if run.parts else {}
    if run.out_dir is not None:
        more["out_dir"] = run.out_dir
    return {**more, **(run.result or {})}


def summary(pipeline_id: str, runs: Mapping[str, StageRun]) -> dict[str, Any]:
    """A pipeline's result."""
    stages = {
        name: {
            "state": run.state.value,
            "task_ids": [part.task_id for part in run.parts],
            "out_dir": run.out_dir,
            "seconds": None if run.seconds is None else round(run.seconds, 3),
            "error": run.error,
            "verdict": run.verdict,
            "with": run.stage.each,
            "result": run.result,
        }
        for name, run in runs.items()
    }
    kept = {name: {key: value for key, value in stage.items() if value is not None} for name, stage in stages.items()}
    return {"ok": all(run.state.lets_others_run for run in runs.values()), "pipeline_id": pipeline_id, "stages": kept}
