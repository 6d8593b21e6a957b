"""Deliveries that are stopped at awkward moments: each still ends its task and leaves no folder behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from flowmesh.execution.admission import accept
from flowmesh.execution.delivery.deliveries import Deliveries
from flowmesh.execution.delivery.delivery_children import DeliveryChildren
from flowmesh.execution.delivery.jobs import Jobs
from flowmesh.execution.housekeeping.cleanup import Cleanup
from flowmesh.execution.layout import Layout
from flowmesh.execution.near_disk import NearDisk
from flowmesh.execution.run import Run
from flowmesh.node.slots import Slot, SlotPlan
from flowmesh.processes.helper import Helpers
from flowmesh.processes.server_pool import ServerPool
from flowmesh.settings.schema import Settings
from flowmesh.startup import environments
from flowmesh.tasks import machine
from flowmesh.tasks.machine import State, Task
from flowmesh.tasks.verdicts import Kind, Verdict

HTTP = {"destination": {"type": "http", "url": "http://127.0.0.1:9/nobody"}}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    for name in ("spool", "tmp", "results", "run", "log"):
        (tmp_path / name).mkdir()
    return Layout(
        state_dir=tmp_path,
        results_dir=tmp_path / "results",
        work_dir=tmp_path,
        mark="test",
        base_env={},
        cgroup=None,
        processes=Settings().processes,
    )


def ended_run(layout: Layout, output: dict[str, object]) -> Run:
    """A run that computed its result, as it is when its delivery begins."""
    task = {"apiVersion": "flowmesh/v1", "kind": "Task", "metadata": {}, "spec": {"taskType": "echo", "output": output}}
    message = json.dumps({"task_id": "t-1", "task": task, "assigned_worker": "w1"}).encode()
    catalogue = environments.plan(Settings())[0]
    accepted = accept(message, settings=Settings(), catalogue=catalogue, results_dir=layout.results_dir)
    run = Run(1, accepted, Slot(SlotPlan(name="slot", worker_id="w1")))
    run.task = Task(state=State.DELIVERING, verdict=Verdict(kind=Kind.OK))
    Path(run.accepted.target.out_dir).mkdir()
    layout.spool(1).mkdir()
    outcome = {"attempt": 1, "ok": True, "result": {"ok": True}}
    (layout.spool(1) / "outcome.json").write_bytes(msgspec.json.encode(outcome))
    layout.tmp(1).mkdir()
    (layout.tmp(1) / "left").write_text("by the task")
    return run


def deliveries(layout: Layout, places: int = 1) -> Deliveries:
    settings = Settings()
    pool = ServerPool(
        {},
        folder=layout.state_dir / "run",
        log_folder=layout.log_dir,
        env={},
        adoption_timeout_s=1.0,
        cgroup=None,
        mark="test",
    )
    delivery = msgspec.structs.replace(
        settings, delivery=msgspec.structs.replace(settings.delivery, concurrency=places)
    )
    children = DeliveryChildren(delivery, layout, Helpers(pool))
    disk = NearDisk(layout.results_dir, lambda: True)
    return Deliveries(children, Jobs(settings, layout), layout, Cleanup(layout), environment=Never(), disk=disk)


class Never:
    """No child of these tests is started."""

    wait_s = 0.0

    def report(self, environment: str, reason: str) -> None:
        raise AssertionError(f"{environment}: {reason}")

    async def works(self, environment: str, stopped: Callable[[], bool], until: float) -> bool:
        raise AssertionError(environment)


def test_a_cancel_before_the_first_step_of_a_delivery(layout: Layout) -> None:
    async def story() -> machine.Event | None:
        parts, run = deliveries(layout), ended_run(layout, {})
        work = parts.run(run)
        parts.abort(run)
        return await work

    assert asyncio.run(story()) == machine.Delivered("cancelled while delivering")
    assert not layout.tmp(1).exists()


def test_a_cancel_while_it_waits_for_a_place(layout: Layout) -> None:
    async def story() -> machine.Event | None:
        parts, run = deliveries(layout, places=0), ended_run(layout, HTTP)
        work = asyncio.create_task(parts.run(run))
        while layout.tmp(1).exists():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)  # it has begun to wait, or is about to: a cancel must end it either way
        parts.abort(run)
        return await asyncio.wait_for(work, 10)

    assert asyncio.run(story()) == machine.Delivered("cancelled while delivering")
    assert not layout.tmp(1).exists()


@pytest.mark.parametrize("moment", ["before", "waiting"])
def test_a_node_that_ends_leaves_the_sending_to_the_next_one(layout: Layout, moment: str) -> None:
    async def story() -> tuple[machine.Event | None, set[int]]:
        parts, run = deliveries(layout, places=0), ended_run(layout, HTTP)
        work = asyncio.ensure_future(parts.run(run))
        if moment == "waiting":
            while layout.tmp(1).exists():
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
        parts.suspend()
        return await asyncio.wait_for(work, 10), parts.left

    assert asyncio.run(story()) == (None, {1})
    assert not layout.tmp(1).exists()
    assert (layout.spool(1) / "outcome.json").exists()
