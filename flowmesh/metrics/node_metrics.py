"""The metrics of a node: what its tasks took and how they ended is counted, the rest is looked at when it is asked for.

Counters begin at 0 with each supervisor, as Prometheus expects of a process that starts again.
"""

from __future__ import annotations

import time
from typing import Any

from flowmesh import installed
from flowmesh.execution.executor import Executor
from flowmesh.execution.observer import Observer
from flowmesh.execution.run import Run
from flowmesh.metrics.endpoint_metrics import EndpointMetrics
from flowmesh.metrics.families import OTHER, Family, Histogram, text_of
from flowmesh.orchestrator.link import Link
from flowmesh.orchestrator.worker_description import NodeDescription
from flowmesh.tasks.machine import State
from flowmesh.tasks.verdicts import Kind, Verdict

REFUSED = "none"
"""The type of a task that was refused."""
SLOT_STATES = ("STARTING", "IDLE", "RUNNING", "DEGRADED", "DRAINING")
MOST_PHASES = 40
"""Phases with names of their own, of one type; a task may invent any."""
_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_LONG = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)


class NodeMetrics(Observer):
    def __init__(self, node: NodeDescription, executor: Executor, link: Link) -> None:
        self._node = node
        self._executor = executor
        self._link = link
        self._phases: dict[str, set[str]] = {}
        self._exits = Family("counter", "flowmesh_task_exits_total", "Tasks that ended.", ("type", "verdict"))
        self._queue = Histogram("flowmesh_task_queue_seconds", "From acceptance to the start.", ("type",), _LONG)
        self._run = Histogram(
            "flowmesh_task_run_seconds", "From the start to the last process's end.", ("type",), _LONG
        )
        self._phase = Histogram("flowmesh_task_phase_seconds", "Of a task's phases.", ("type", "phase"), _LONG)
        self._fork = Histogram("flowmesh_fork_seconds", "From the fork request to the process.", ("type",), _SHORT)
        self._release = Histogram("flowmesh_gpu_release_seconds", "Until a task's GPUs were free again.", (), _SHORT)
        self._energy = Family("counter", "flowmesh_task_energy_joules_total", "Used by tasks.", ("type", "device"))
        self._rows = Family("counter", "flowmesh_rows_total", "Rows that tasks computed.", ("type",))
        self._tokens = Family("counter", "flowmesh_tokens_total", "Tokens read and written.", ("type", "kind"))
        self._info = Family("gauge", "flowmesh_node_info", "1, with what the node is.", ("node", "version"))
        self._slots = Family("gauge", "flowmesh_slot_state", "1 for the state of a slot.", ("worker", "slot", "state"))
        self._tasks = Family("gauge", "flowmesh_tasks", "Tasks that the node has now.", ("state",))
        self._faults = Family("gauge", "flowmesh_node_faults", "Faults of the node that hold now.")
        self._deliveries = Family("gauge", "flowmesh_delivery_pending", "Tasks whose results are being delivered.")
        self._outbox = Family("gauge", "flowmesh_outbox_events", "Events that wait to be published.")
        self._redis = Family("gauge", "flowmesh_redis_up", "1 if everything that talks to Redis can.")
        self._late = Family("gauge", "flowmesh_heartbeat_late_seconds", "How late the last heartbeat was.", ("worker",))
        self._boards = Family("counter", "flowmesh_gpu_energy_joules_total", "Used since the start.", ("uuid",))
        self._uptime = Family("gauge", "flowmesh_uptime_seconds", "Since this supervisor started.")
        self._endpoints = EndpointMetrics(executor.runs)
        executor.observers.add(self)

    def on_refused(self, task_id: str, message: str, kind: Kind) -> None:  # noqa: ARG002
        self._exits.add(REFUSED, kind.value)

    def on_ended(self, run: Run, verdict: Verdict) -> None:
        kind = run.accepted.type.name
        self._exits.add(kind, verdict.kind.value)
        if run.started:
            self._queue.observe(max(0.0, run.started - run.queued_at), kind)
            self._run.observe(run.runtime_s, kind)
            if run.fork_asked:
                self._fork.observe(max(0.0, run.started - run.fork_asked), kind)
        if isinstance(ms := run.resources.get("gpu_release_ms"), int | float):
            self._release.observe(ms / 1000)
        for name, joules in (run.energy or {}).items():
            if name.endswith("_joules") and isinstance(joules, int | float):
                self._energy.add(kind, name.removesuffix("_joules"), by=joules)
        if run.outcome is None:
            return
        for phase, seconds in run.outcome.phases.items():
            self._phase.observe(seconds, kind, self._named(kind, phase))
        if run.outcome.rows is not None:
            self._rows.add(kind, by=max(0, run.outcome.rows.done - run.outcome.rows.reused))
        usage = (run.outcome.result or {}).get("usage")
        for field in ("prompt_tokens", "completion_tokens"):
            if isinstance(usage, dict) and isinstance(count := usage.get(field), int) and count > 0:
                self._tokens.add(kind, field.removesuffix("_tokens"), by=count)

    def _named(self, kind: str, phase: str) -> str:
        known = self._phases.setdefault(kind, set())
        if phase not in known and len(known) >= MOST_PHASES:
            return OTHER
        known.add(phase)
        return phase

    def text(self) -> str:
        """All metrics as they are now. Called on the loop; reads nothing that may block but the journal."""
        executor = self._executor
        self._info.set(1, self._node.node_id, installed.version())
        self._slots.clear()
        presences = self._link.registration.presences
        for worker_id, slot in executor.slots.items():
            word = presences[worker_id].status.word
            for state in dict.fromkeys((*SLOT_STATES, word)):
                self._slots.set(float(state == word), worker_id, slot.plan.name, state)
            if presences[worker_id].late_s:
                self._late.set(round(presences[worker_id].late_s[-1], 6), worker_id)
        states = [run.task.state for run in executor.runs]
        for each in State:
            if each is not State.DONE:
                self._tasks.set(states.count(each), each.value)
        self._faults.set(len(executor.parts.conditions.listed()))
        self._deliveries.set(states.count(State.DELIVERING))
        self._outbox.set(executor.journal.outbox_size())
        self._redis.set(float(self._link.up))
        for uuid, joules in self._node.power.totals().board_j.items():
            self._boards.set(round(joules, 3), uuid)
        self._uptime.set(round(time.monotonic() - self._node.started, 3))
        families: list[Any] = [each for each in vars(self).values() if isinstance(each, Family | Histogram)]
        return text_of([*families, *self._endpoints.families()])
