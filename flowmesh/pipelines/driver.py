"""Runs a pipeline: each stage when those it depends on have ended, side by side as far as there are slots.

One thread calls it. A stage's failure ends what depends on it and nothing else.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.errors import FlowMeshError
from flowmesh.pipelines.conditions import ConditionError
from flowmesh.pipelines.document import Pipeline, holds
from flowmesh.pipelines.keys import key_of
from flowmesh.pipelines.merging import merge_key, together
from flowmesh.pipelines.parts import Part, Record
from flowmesh.pipelines.ports import Ended, Event, Port, Seen, Started, Task
from flowmesh.pipelines.progress import StageRun, State, results_of, summary
from flowmesh.pipelines.resolved import resolve
from flowmesh.pipelines.shards import LISTS, merged, shards_of
from flowmesh.pipelines.store import Store


class Driver:
    """
    Args:
        pipeline_id: its tasks are `<pipeline_id>.<stage>`.
        changed: called with a stage whenever it has changed.
        new_run: the id of a stage's run. A driver that goes on where another one stopped has the same for the same run:
            what ended in it, ended for both.
        merged: by id of a task that an earlier driver started: the ids of all that run in it, of a task that runs
            by itself its own.
        local_files: whether the files that a stage names are on this machine, and decide whether it runs again.
        tick: called after each wait for an event; may call `stop`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        pipeline_id: str,
        port: Port,
        store: Store,
        *,
        changed: Callable[[StageRun], None] = lambda run: None,  # noqa: ARG005
        tick: Callable[[], None] = lambda: None,
        new_run: Callable[[StageRun], str] = lambda run: secrets.token_hex(8),  # noqa: ARG005
        merged: Mapping[str, tuple[str, ...]] | None = None,
        local_files: bool = True,
    ) -> None:
        self.pipeline = pipeline
        self.pipeline_id = pipeline_id
        self.runs = {stage.name: StageRun(stage=stage) for stage in pipeline.stages}
        self._port = port
        self._store = store
        self._changed = changed
        self._tick = tick
        self._new_run = new_run
        self._merged = dict(merged or {})
        self._local_files = local_files
        self._before = store.load()
        self._pending: list[Part] = []
        self._running: dict[str, list[Part]] = {}
        """By id of a task: the parts that it runs; the first one is its own."""
        self._stopped = self._forced = False

    def run(self) -> dict[str, Any]:
        """Run all stages; returns the pipeline's result.

        Raises:
            FlowMeshError: the place where tasks run is gone, or the store cannot be written.
        """
        while True:
            self._advance()
            if not self._running and not self._pending:
                break
            event = self._port.next()
            if event is not None:
                self._apply(event)
            self._tick()
        for run in self.runs.values():
            if not run.state.ended:
                self._end(run, State.CANCELLED)
        result = summary(self.pipeline_id, self.runs)
        self._store.finish(result)
        return result

    @property
    def stopped(self) -> bool:
        """Whether it starts nothing more."""
        return self._stopped

    @property
    def forced(self) -> bool:
        """Whether it was stopped by force."""
        return self._forced

    def stop(self, *, force: bool = False) -> None:
        """Start nothing more, and cancel what runs. `run` returns when that has ended."""
        if not self._stopped:
            self._stopped = True
            for run in self.runs.values():
                if not run.state.ended and run.state is not State.RUNNING:
                    self._end(run, State.CANCELLED)
            running = {part.stage for parts in self._running.values() for part in parts}
            self._pending = []
            for run in self.runs.values():
                if run.state is State.RUNNING and run.name not in running:
                    self._end(run, State.CANCELLED)
        self._forced = self._forced or force
        for task_id in self._running:
            self._port.cancel(task_id, force=force)

    def _advance(self) -> None:
        """Decide on the stages that wait for nothing any more, and start tasks as far as there is room."""
        refused = True
        while refused and not self._stopped:
            while sum(self._decide(run) for run in self.runs.values() if run.state is State.WAITING):
                pass
            refused = self._start()

    def _start(self) -> bool:
        """Start tasks as far as there is room; True where one cannot run at all, which may end other stages."""
        while self._pending:
            parts = self._next_parts()
            first = parts[0]
            try:
                if not self._port.submit(self._task(parts)):
                    return False
            except FlowMeshError as error:
                self._pending = [part for part in self._pending if part.stage != first.stage]
                self._end(self.runs[first.stage], State.FAILED, str(error), "bad_request")
                return True
            self._pending = [part for part in self._pending if part not in parts]
            self._running[first.task_id] = parts
            self._merged.pop(first.task_id, None)
            for part in parts:
                self.runs[part.stage].merged_into = first.stage if part is not first else None
        return False

    def _next_parts(self) -> list[Part]:
        """The parts that run as the next task: those of an earlier driver's task together, as it started them."""
        first = self._pending[0]
        taken = {task_id for ids in self._merged.values() for task_id in ids}
        for task_id, ids in self._merged.items():
            if first.task_id in ids:
                parts = [part for each in ids for part in self._pending if part.task_id == each]
                if parts[0].task_id == task_id:
                    return parts
        return [first, *together(first, [part for part in self._pending[1:] if part.task_id not in taken])]

    def _decide(self, run: StageRun) -> bool:
        """Whether a stage that waited does so no more."""
        stage = run.stage
        others = [self.runs[name] for name in stage.depends_on]
        if not all(other.state.ended for other in others):
            return False
        if bad := [other.name for other in others if not other.state.lets_others_run]:
            self._end(run, State.BLOCKED, f"depends on {', '.join(bad)}")
            return True
        results = results_of(self.pipeline, self.runs, stage)
        try:
            if not holds(stage, results, self.pipeline.names):
                self._end(run, State.SKIPPED)
                return True
            spec = resolve(stage, results, self.pipeline.names)
        except (FlowMeshError, ConditionError) as error:
            self._end(run, State.FAILED, str(error), "bad_request")
            return True
        used = {other.name: other.run for other in others if other.run}
        run.key = key_of(spec, used, local_files=self._local_files)
        run.run = self._new_run(run)
        before = self._before.get(stage.name)
        if before is not None and (before.run == run.run or self._can_reuse(before, run.key)):
            self._take_over(run, before)
            return True
        run.state = State.READY
        specs = [spec] if stage.parallel is None else shards_of(spec, stage.parallel, self._port.slots())
        run.parts = [self._part(run, index, spec, len(specs)) for index, spec in enumerate(specs)]
        self._pending += run.parts
        self._changed(run)
        return True

    def _take_over(self, run: StageRun, before: Record) -> None:
        """Take the kept end of a stage as its end: of an earlier run, or of this one, which another driver began."""
        if before.run != run.run:
            state = State.REUSED
        elif before.ok:
            state = State.SUCCEEDED
        else:
            state = State.FAILED
        run.parts = [Part(stage=run.name, task_id=task_id, spec={}) for task_id in before.task_ids]
        run.result, run.out_dir, run.worker, run.run = before.result, before.out_dir, before.worker, before.run
        run.end(state, before.error, before.verdict)
        self._changed(run)

    def _part(self, run: StageRun, index: int, spec: dict[str, Any], total: int) -> Part:
        task_id = f"{self.pipeline_id}.{run.name}" + (f".s{index}" if total > 1 else "")
        key = merge_key(spec) if total == 1 and run.stage.merges else None
        return Part(stage=run.name, task_id=task_id, spec=spec, index=index, merge_key=key)

    def _can_reuse(self, before: Record, key: str) -> bool:
        gone = before.out_dir is not None and not Path(before.out_dir).is_dir()
        return before.ok and before.key == key and not gone

    def _task(self, parts: list[Part]) -> Task:
        first, *children = parts
        head = self.pipeline.head
        metadata = {**(head.get("metadata") or {}), "name": first.stage}
        document: dict[str, Any] = {**head, "metadata": metadata, "spec": first.spec}
        if children:
            document["merge_children"] = [{"task_id": child.task_id, "spec": child.spec} for child in children]
        return Task(task_id=first.task_id, document=document)

    def _apply(self, event: Event) -> None:
        parts = self._running.get(event.task_id)
        if parts is None:
            return
        match event:
            case Started():
                for part in parts:
                    self.runs[part.stage].begin()
                    self._changed(self.runs[part.stage])
            case Seen(text=text, fraction=fraction):
                for part in parts:
                    run = self.runs[part.stage]
                    run.begin()
                    run.seen, run.fraction = text, fraction
                    self._changed(run)
            case Ended():
                del self._running[event.task_id]
                self._ended(parts, event)

    def _ended(self, parts: list[Part], event: Ended) -> None:
        first, *children = parts
        if children and (not event.ok or _is_short(event.result)) and not self._stopped:
            # One of them may have made all fail, or together they are too large: each runs again by itself.
            for part in parts:
                part.merge_key = None
                self.runs[part.stage].state = State.READY
                self.runs[part.stage].merged_into = None
            self._pending = [*parts, *self._pending]
            return
        result = dict(event.result) if event.result is not None else None
        results = result.pop("children", None) if result is not None and children else None
        unsettled = [run for run in (self.runs[part.stage] for part in parts) if not run.state.ended]
        self._part_ended(first, _with_result(event, first.task_id, result, event.out_dir))
        for child in children:
            own = results.get(child.task_id) if isinstance(results, dict) else None
            folder = str(Path(event.out_dir).parent / child.task_id) if event.out_dir is not None else None
            self._part_ended(child, _child_end(event, child.task_id, own, folder))
        self._settle([run for run in unsettled if run.state.ended])

    def _part_ended(self, part: Part, end: Ended) -> None:
        """Note the end of a part, and its stage's where it is the last one; `_settle` keeps that."""
        run = self.runs[part.stage]
        run.ends = {**run.ends, part.task_id: end}
        if not end.ok and not run.state.ended:
            self._pending = [other for other in self._pending if other.stage != part.stage]
            for task_id, parts in self._running.items():
                if parts[0].stage == part.stage:
                    self._port.cancel(task_id, force=False)
            run.out_dir, run.worker = end.out_dir, end.worker
            state = State.CANCELLED if self._stopped and end.verdict == "cancelled" else State.FAILED
            run.end(state, end.error, end.verdict)
        elif not run.state.ended and len(run.ends) == len(run.parts):
            ends = [run.ends[each.task_id] for each in run.parts]
            run.out_dir, run.worker = ends[0].out_dir, ends[0].worker
            results = [each.result or {} for each in ends]
            parallel = run.stage.parallel
            task_type = str(part.spec.get("taskType"))
            if len(results) > 1 and any(map(_is_short, results)):
                run.end(
                    State.FAILED,
                    "a shard's result does not lie in Redis as a whole (it is above 1 MiB, or "
                    "queue.result_ttl_s is 0 on its node); use more shards",
                    "error",
                )
                return
            if len(results) > 1 and parallel is not None and task_type in LISTS:
                run.result = merged(task_type, results, contiguous=parallel.contiguous is not False)
            else:
                run.result = results[0]
            run.end(State.SUCCEEDED)

    def _end(self, run: StageRun, state: State, error: str | None = None, verdict: str | None = None) -> None:
        run.end(state, error, verdict)
        self._settle([run])

    def _settle(self, ended: list[StageRun]) -> None:
        """Keep the ends of stages in one step: of those that ran as one task, none may be missing to a later driver."""
        kept = [run.as_record() for run in ended if run.state in (State.SUCCEEDED, State.FAILED) and run.key]
        if kept:
            self._store.save(*kept)
        for run in ended:
            self._changed(run)


def _is_short(result: dict[str, Any] | None) -> bool:
    """Whether only a summary of a task's result is there."""
    return result is not None and result.get("truncated") is True


def _with_result(event: Ended, task_id: str, result: dict[str, Any] | None, out_dir: str | None) -> Ended:
    return msgspec.structs.replace(event, task_id=task_id, out_dir=out_dir, result=result)


def _child_end(event: Ended, task_id: str, own: Any, folder: str | None) -> Ended:
    """The end of a merged child, by its part of its parent's result."""
    if not event.ok:
        return _with_result(event, task_id, None, folder)
    if not isinstance(own, dict) or own.get("ok") is False:
        why = str(own.get("error")) if isinstance(own, dict) else "the task that it was merged into has no result of it"
        return Ended(task_id=task_id, ok=False, verdict="error", error=why, out_dir=folder, worker=event.worker)
    kept = {"ok": True, **({"model": event.result["model"]} if event.result and "model" in event.result else {})}
    return _with_result(event, task_id, {**kept, **own}, folder)
