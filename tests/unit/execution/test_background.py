"""Work beside the loop: its event is applied, and an error in it, or in applying it, ends the run's task."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from flowmesh.execution.background import Background
from flowmesh.execution.run import Run
from flowmesh.tasks import machine


class Told:
    task_id = "t-1"


@pytest.mark.parametrize("fails", ["", "work", "applying its event"])
def test_each_work_leads_to_an_event(fails: str) -> None:
    posted: list[machine.Event] = []
    ended: list[int] = []

    def post(_run: Run, event: machine.Event) -> None:
        if fails == "applying its event" and event == machine.Released():
            raise ValueError(fails)
        posted.append(event)

    async def work() -> machine.Event | None:
        await asyncio.sleep(0)
        if fails == "work":
            raise ValueError(fails)
        return machine.Released()

    async def story() -> None:
        background = Background(post, lambda _run, message: machine.ChildLost(message), lambda: ended.append(1))
        background.begin(work(), cast(Any, Told()))
        while not ended:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(story(), 10))
    expected = machine.ChildLost(f"unhandled error in the node: ValueError: {fails}") if fails else machine.Released()
    assert posted == [expected]
