"""The node's ends of running tasks' pipes: cancel frames out; phases and progress in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from loguru import logger

from flowmesh.execution.run import Run, progress_event
from flowmesh.processes.pipe import Cancel, Finished, FrameError, Hello, Phase, Pipe, Progress, Serving

FRAMES_A_TURN = 512
"""More than a pipe holds; a child that writes as fast as the node reads must not block the loop."""
MAX_BAD_FRAMES = 20
"""After so many malformed frames a child's pipe is closed."""


class ChildPipes:
    """Used on the loop only. Whatever a child writes affects its own task only."""

    def __init__(self, on_endpoint: Callable[[Run], None] = lambda _: None) -> None:
        """
        Args:
            on_endpoint: called with a run that has begun to serve a model, or has ended to.
        """
        self._on_endpoint = on_endpoint
        self._loop = asyncio.get_running_loop()

    def open(self, run: Run, pipe: Pipe) -> None:
        """Read the child's frames from now on."""
        run.pipe = pipe
        self._loop.add_reader(pipe.fileno(), self.read, run)

    def send(self, run: Run, frame: Cancel) -> None:
        """Best effort: if the frame is lost, the grace timer escalates to SIGTERM."""
        if run.pipe is None:
            return
        try:
            run.pipe.send(frame, drop=True)
        except (OSError, FrameError) as error:
            logger.bind(task=run.task_id).debug("cancel frame not sent: {}", error)

    def read(self, run: Run) -> None:
        """Take in all frames that wait."""
        pipe = run.pipe
        if pipe is None:
            return
        try:
            for _ in range(FRAMES_A_TURN):
                if run.pipe is None or (frame := pipe.poll()) is None:
                    return
                run.last_frame_at = time.monotonic()
                match frame:
                    case Phase(name=name):
                        run.enter(name)
                    case Progress():
                        run.progress = frame
                        run.trend.add(frame.metrics)
                        run.notify(progress_event(frame))
                    case Serving():
                        if run.serve(frame):
                            self._on_endpoint(run)
                    case Finished():
                        run.finished_frame = True
                        if run.serving is not None:
                            self._on_endpoint(run)
                    case Hello() | _:
                        pass
        except EOFError:
            self.close(run)
        except FrameError as error:
            run.bad_frames += 1
            if run.bad_frames == 1:
                logger.bind(task=run.task_id).warning("malformed frame from the task's child: {}", error)
            if run.bad_frames >= MAX_BAD_FRAMES:
                logger.bind(task=run.task_id).warning("pipe closed after {} malformed frames", run.bad_frames)
                self.close(run)

    def close(self, run: Run) -> None:
        if run.pipe is not None:
            self._loop.remove_reader(run.pipe.fileno())
            run.pipe.close()
            run.pipe = None
