"""Takes a task over the control socket, as if it had been dispatched to one of this node's workers."""

from __future__ import annotations

from typing import Any

import msgspec

from flowmesh.control.server import ControlError, text_field
from flowmesh.errors import FieldError
from flowmesh.execution.executor import Executor
from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run
from flowmesh.messages.matching import match
from flowmesh.messages.text import encode_json
from flowmesh.messages.wire import usable_task_id, utc_now
from flowmesh.node.slots import Slot
from flowmesh.orchestrator.link import Link
from flowmesh.tasks.verdicts import Kind


class Submissions(Observer):
    def __init__(self, executor: Executor, link: Link) -> None:
        self._executor = executor
        self._link = link
        self._refused: dict[str, tuple[str, Kind]] = {}
        """By id, while it is taken: why the node refused it, with an event."""
        executor.observers.add(self)

    def on_refused(self, task_id: str, message: str, kind: Kind) -> None:
        if task_id in self._refused:
            self._refused[task_id] = (message, kind)

    def take(self, request: dict[str, Any], body: bytes) -> dict[str, Any]:
        """Queue a task for the worker that suits it best.

        Args:
            request: has `task_id`.
            body: the document, JSON.

        Returns:
            `worker_id`, and `waits`: how many tasks come before it. Of a task that ended at once, because its document
            cannot run, also `refused`, the reason, and `verdict`.

        Raises:
            ControlError: it fits no worker of this node, or the node takes no task now.
        """
        task_id = text_field(request, "task_id")
        if usable_task_id(task_id) is None:
            raise ControlError(f"task_id: invalid task id {task_id!r:.80}")
        if self._executor.draining is not None:
            raise ControlError("the node drains and takes no task; `flowmesh drain --cancel` takes that back")
        if self._executor.runs.of_task(task_id) is not None:
            raise ControlError(f"task_id: the node has a task {task_id} already; give another id")
        try:
            document = msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ControlError(f"the document is not a JSON object: {error}") from None
        slot = self._fitting(document)
        waits = len(slot.queue) + (slot.current is not None)
        spec = document.get("spec")
        message = {
            "task_id": task_id,
            "task": document,
            "task_type": spec.get("taskType") if isinstance(spec, dict) else None,
            "assigned_worker": slot.plan.worker_id,
            "dispatched_at": utc_now(),
            "parent_task_id": None,
        }
        if isinstance(children := document.pop("merge_children", None), list) and children:
            message["merged_children"] = children
        self._refused[task_id] = ("", Kind.ERROR)
        try:
            if not self._link.dispatcher.take(encode_json(message)):
                raise ControlError("the node cannot take the task now; its status says why")
        finally:
            refused, kind = self._refused.pop(task_id)
        answer = {"worker_id": slot.plan.worker_id, "waits": waits}
        return answer if not refused else {**answer, "refused": refused, "verdict": kind.value}

    def _fitting(self, document: dict[str, Any]) -> Slot[Run]:
        """An open slot that has what the document asks for, with as few tasks before it as possible."""
        place: Any = document
        for name in ("spec", "resources", "hardware"):
            place = place.get(name) if isinstance(place, dict) else None
        reasons, fitting = [], []
        for worker_id, slot in self._executor.slots.items():
            try:
                hardware = msgspec.to_builtins(self._link.registration.presences[worker_id].identity.hardware)
                lacks = match(hardware, place or {})
            except FieldError as error:
                raise ControlError(str(error)) from None
            reasons += [f"{worker_id}: {each}" for each in (*lacks, *([slot.trouble] if slot.trouble else []))]
            if not lacks and not slot.trouble:
                fitting.append(slot)
        if not fitting:
            raise ControlError(f"no worker of this node can take the task: {'; '.join(reasons)}")
        return min(fitting, key=lambda slot: len(slot.queue) + (slot.current is not None))
