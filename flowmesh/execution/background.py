"""Coroutines beside the loop's callbacks, whose result is a run's next event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from loguru import logger

from flowmesh.execution.ports import PostEvent, Work
from flowmesh.execution.run import Run
from flowmesh.tasks import machine


class Background:
    """
    Args:
        post: applies the event that a coroutine returned.
        after_error: the event that an unhandled error means for a run.
        on_ended: called when a coroutine has ended and its event is applied.
    """

    def __init__(
        self, post: PostEvent, after_error: Callable[[Run, str], machine.Event | None], on_ended: Callable[[], None]
    ) -> None:
        self._post = post
        self._after_error = after_error
        self._on_ended = on_ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def begin(self, work: Work, run: Run | None = None) -> None:
        """See `ports.Begin`."""
        task = self._loop.create_task(self._carry_out(work, run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, work: Work, run: Run | None) -> None:
        try:
            event = await work
            if run is not None and event is not None:
                self._post(run, event)
        except Exception as error:  # noqa: BLE001 - the boundary: whatever it is, the run's task must end
            logger.bind(task=run and run.task_id).opt(exception=error).error("unhandled error in task handling")
            message = f"unhandled error in the node: {type(error).__name__}: {error}"
            if run is not None and (event := self._after_error(run, message)) is not None:
                self._post(run, event)
        self._on_ended()
