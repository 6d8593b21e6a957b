"""The node's ends of running tasks' pipes: what is said to a child, and what it says."""

from __future__ import annotations

import asyncio
import time

from loguru import logger

from flowmesh.execution.run import MAX_BAD_FRAMES, Run, progress_event
from flowmesh.processes.pipe import Cancel, FrameError, Hello, Phase, Pipe, Progress

FRAMES_A_TURN = 512
"""More than a pipe holds; a child that writes as fast as we read does not keep the loop."""


class Hearing:
    """On the loop. Whatever a child writes cannot hurt more than its own task."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def open(self, run: Run, pipe: Pipe) -> None:
        """Listen to a child from now on."""
        run.pipe = pipe
        self._loop.add_reader(pipe.fileno(), self.read, run)

    def say(self, run: Run, frame: Cancel) -> None:
        """Where it does not get through, the grace that runs meanwhile leads to stronger words."""
        if run.pipe is None:
            return
        try:
            run.pipe.send(frame, drop=True)
        except (OSError, FrameError) as error:
            logger.bind(task=run.task_id).debug("not said: {}", error)

    def read(self, run: Run) -> None:
        """Take in all frames that wait."""
        pipe = run.pipe
        if pipe is None:
            return
        try:
            for _ in range(FRAMES_A_TURN):
                if run.pipe is None or (frame := pipe.poll()) is None:
                    return
                run.last_heard = time.monotonic()
                match frame:
                    case Phase(name=name):
                        run.enter(name)
                    case Progress():
                        run.progress = frame
                        run.tell(progress_event(frame))
                    case Hello() | _:
                        pass
        except EOFError:
            self.close(run)
        except FrameError as error:
            run.bad_frames += 1
            if run.bad_frames == 1:
                logger.bind(task=run.task_id).warning("its child writes garbage into the pipe: {}", error)
            if run.bad_frames >= MAX_BAD_FRAMES:
                logger.bind(task=run.task_id).warning("its pipe is closed: too much garbage")
                self.close(run)

    def close(self, run: Run) -> None:
        """Listen no more."""
        if run.pipe is not None:
            self._loop.remove_reader(run.pipe.fileno())
            run.pipe.close()
            run.pipe = None
