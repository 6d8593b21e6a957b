"""The picture of this machine's node, from its control socket."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import psutil

from flowmesh.cli import render
from flowmesh.cli.control import Control
from flowmesh.cli.control_types import FaultStatus, LogsPlace
from flowmesh.cli.top.picture import Gpu, Host, Picture, Server, Slot, end_of, task_of
from flowmesh.errors import ProtocolError

LIMIT = 50
"""Waiting tasks and deliveries that are asked for: what it costs the node is bounded, however many there are."""
_FIRST_CPU_S = 0.1
"""How long the first look at the CPU takes; later ones cover the time between two."""


class NodeSource:
    can_follow_logs = True

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._looked = False

    def fetch(self) -> Picture:
        """
        Raises:
            UnavailableError: no node answers; ProtocolError: its answer cannot be used.
        """
        with Control(self._state_dir) as control:
            answer = control.status_json(LIMIT)
        return self.picture(answer)

    def picture(self, answer: dict[str, Any]) -> Picture:
        """The picture of a status answer. Raises ProtocolError."""
        try:
            return self._picture(answer)
        except (msgspec.ValidationError, AttributeError, KeyError, TypeError) as error:
            raise ProtocolError(f"the node's status cannot be read: {error}; is its version the same?") from None

    def cancel(self, task_id: str) -> str:
        """Cancel a task; returns what to say about it."""
        with Control(self._state_dir) as control:
            control.cancel(task_id)
        return f"cancelling {task_id}"

    def logs(self, task_id: str) -> LogsPlace:
        with Control(self._state_dir) as control:
            return control.logs(task_id)

    def close(self) -> None:
        """Nothing is open between two fetches."""

    def _picture(self, status: dict[str, Any]) -> Picture:
        owner_of = {uuid: each["worker_id"] for each in status["workers"] for uuid in each.get("gpus") or ()}
        gpus = tuple(
            msgspec.convert({**each, "worker_id": owner_of.get(each.get("uuid"))}, Gpu)
            for each in status.get("gpus") or ()
        )
        tasks = [task_of(each) for each in status.get("tasks") or ()]
        redelivered = [
            task_of({"task_id": task_id, "state": "delivering", "waits_for": what or None})
            for task_id, what in (status.get("redeliveries") or {}).items()
        ]
        queue = tuple(task for task in tasks if task.state == "queued")
        costs = [each["cost_per_hour"] for each in status["workers"] if each.get("cost_per_hour") is not None]
        return Picture(
            of="node",
            about=_about(status),
            troubles=tuple(_troubles(status)),
            gpus=gpus,
            slots=tuple(_slot(each) for each in status["workers"]),
            running=tuple(task for task in tasks if task.state not in ("queued", "delivering", "done")),
            queue=queue[:LIMIT],
            queued=max(len(queue), status.get("queued") or 0),
            deliveries=(*(task for task in tasks if task.state == "delivering"), *redelivered)[:LIMIT],
            recent=tuple(end_of(each) for each in status.get("recent") or ()),
            servers=tuple(msgspec.convert(each, Server) for each in status.get("servers") or ()),
            power_w=((status.get("power") or {}).get("gpu_watts") or {}).get("total"),
            cost_per_hour=sum(costs) if costs else None,
            host=self._host(),
        )

    def _host(self) -> Host:
        cpu = psutil.cpu_percent(None if self._looked else _FIRST_CPU_S)
        self._looked = True
        memory = psutil.virtual_memory()
        return Host(
            cpu_percent=cpu,
            cpus=os.cpu_count() or 1,
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
        )


def _slot(data: dict[str, Any]) -> Slot:
    name = data.get("slot")
    fields = {**data, "name": None if name is None else str(name), "gpus": len(data.get("gpus") or ())}
    return msgspec.convert(fields, Slot)


def _about(status: dict[str, Any]) -> tuple[str, ...]:
    up = render.seconds(float(status.get("uptime_s") or 0.0))
    isolation = str(status.get("isolation") or "")
    version = str(status.get("version") or "?").partition("+")[0]  # without the commit: the line has to fit 80 columns
    return (f"node {version}", f"up {up}", isolation)


def _troubles(status: dict[str, Any]) -> list[str]:
    found = []
    if status.get("draining"):
        found.append(f"draining ({status['draining']}): takes no more tasks")
    redis_troubles = [str(each) for each in status.get("redis_troubles") or ()]
    if not status.get("redis_up"):
        found += redis_troubles or ["Redis does not answer"]
    known = {each.get("reason") for each in status["workers"]}
    faults = [msgspec.convert(each, FaultStatus) for each in status.get("faults") or ()]
    found += [
        f"{fault.name} ({render.seconds(fault.since_s)}): {fault.reason}"
        for fault in faults
        if fault.reason not in known  # it is said of its slot
    ]
    known |= {fault.reason for fault in faults}
    for environment, message in (status.get("warnings") or {}).items():
        if message not in known:
            found.append(f"environment {environment}: {message}")
    if status.get("nobody_listens"):
        found.append("nobody listens to tasks.events: the orchestrator is not there")
    return found
