"""Runs children that are no tasks (deliveries, GPU canaries): `await helpers.run(…)` returns how the child ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from loguru import logger

from flowmesh.errors import LaunchError
from flowmesh.messages.job import Exit
from flowmesh.processes.pipe import Frame, FrameError, Pipe
from flowmesh.processes.protocol import Fork, Forked
from flowmesh.processes.server_pool import ServerPool

OnFrame = Callable[[Frame], object]


class HelperLost(LaunchError):
    """Raised when the fork server of a running helper died: its exit status is unknown."""


class Helper:
    """One such child."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.claimed = False
        """Whether somebody waits for its end."""
        self.killed = False
        self.greeting: Frame | None = None
        self.on_frame: OnFrame | None = None
        self.pipe: Pipe | None = None
        self.ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        """Raises LaunchError if there was no child."""

    def end(self, result: Exit | LaunchError) -> None:
        if self.ended.done():
            return
        if isinstance(result, LaunchError):
            self.ended.set_exception(result)
            self.ended.exception()  # retrieved, so that asyncio does not warn if nobody awaits it
        else:
            self.ended.set_result(result)


class Helpers:
    """The `child_owner.ChildOwner` of these children. Their attempt numbers are unique and chosen by the caller."""

    def __init__(self, pool: ServerPool) -> None:
        self._pool = pool
        self._helpers: dict[int, Helper] = {}
        self._loop = asyncio.get_running_loop()

    async def warm(self, environment: str, *, nice: int = 0) -> None:
        """Wait until the environment's server has finished its imports; an error is reported by `run`.

        Args:
            nice: of the imports, if they begin now; see `ServerPool.warm`.
        """
        await self._pool.warm(environment, nice=nice)

    async def run(
        self, environment: str, fork: Fork, *, greeting: Frame | None = None, on_frame: OnFrame | None = None
    ) -> Exit:
        """Fork a child and wait for its end. A caller that is cancelled kills it.

        Args:
            greeting: the first frame that the child gets.
            on_frame: gets each frame that the child sends; without it they are read and dropped.

        Raises:
            LaunchError: there is no child; HelperLost: its fork server died.
        """
        attempt = fork.attempt
        if (stale := self._helpers.get(attempt)) is not None:  # an earlier supervisor's, which nobody resumed
            self.kill(attempt)
            await asyncio.wait({stale.ended})
        helper = self._helpers[attempt] = Helper(attempt)
        helper.claimed, helper.greeting, helper.on_frame = True, greeting, on_frame
        try:
            await self._pool.launch(environment, fork, self)
            if helper.killed:  # by a `kill` that came before there was a child
                self._pool.kill(attempt)
            return await asyncio.shield(helper.ended)
        except asyncio.CancelledError:
            self.kill(attempt)
            raise
        finally:
            self._remove(helper)

    def resume(
        self, attempt: int, *, greeting: Frame | None = None, on_frame: OnFrame | None = None
    ) -> Coroutine[Any, Any, Exit]:
        """Take over a child that an earlier supervisor forked: at once, so that `kill_unclaimed` spares it.

        Returns:
            what waits for its end. Arguments and errors as for `run`.
        """
        helper = self._helpers.setdefault(attempt, Helper(attempt))
        helper.claimed, helper.greeting, helper.on_frame = True, greeting, on_frame
        if helper.pipe is not None:
            self._listen(helper)
        return self._wait(helper)

    async def _wait(self, helper: Helper) -> Exit:
        try:
            return await asyncio.shield(helper.ended)
        finally:
            self._remove(helper)

    def kill(self, attempt: int) -> None:
        """SIGKILL, also to a child that is still to be forked; does nothing for one that has ended."""
        if (helper := self._helpers.get(attempt)) is not None:
            helper.killed = True
            self._pool.kill(attempt)

    def kill_unclaimed(self) -> None:
        """End the adopted children that nobody has resumed. Called once, when a recovery is over."""
        for helper in list(self._helpers.values()):
            if helper.claimed:
                continue
            self.kill(helper.attempt)
            if helper.ended.done():
                self._remove(helper)

    def on_forked(self, forked: Forked, pipe: Pipe) -> None:
        helper = self._helpers.setdefault(forked.attempt, Helper(forked.attempt))
        helper.pipe = pipe
        if helper.claimed:
            self._listen(helper)

    def on_fork_failed(self, attempt: int, message: str, _own: bool) -> None:
        self._end(attempt, LaunchError(message))

    def on_gone(self, attempt: int, exit_: Exit) -> None:
        self._pool.forget(attempt)
        self._end(attempt, exit_)

    def on_lost(self, attempt: int, message: str) -> None:
        self._end(attempt, HelperLost(message))

    def _end(self, attempt: int, result: Exit | LaunchError) -> None:
        if (helper := self._helpers.get(attempt)) is None:
            return
        if helper.claimed:
            self._read(helper)
        self._close(helper)
        helper.end(result)
        if helper.killed and not helper.claimed:
            self._remove(helper)

    def _listen(self, helper: Helper) -> None:
        assert helper.pipe is not None
        self._loop.add_reader(helper.pipe.fileno(), self._read, helper)
        if helper.greeting is not None:
            with contextlib.suppress(OSError):  # it has ended already: on_gone follows
                helper.pipe.send(helper.greeting, drop=True)

    def _read(self, helper: Helper) -> None:
        """Take in all frames that wait: a pipe that nobody reads fills up and blocks the child."""
        try:
            while helper.pipe is not None and (frame := helper.pipe.poll()) is not None:
                if helper.on_frame is not None:
                    helper.on_frame(frame)
        except EOFError:
            self._close(helper)
        except FrameError as error:
            logger.debug("pipe of helper {} closed: {}", helper.attempt, error)
            self._close(helper)

    def _close(self, helper: Helper) -> None:
        if helper.pipe is not None:
            self._loop.remove_reader(helper.pipe.fileno())
            helper.pipe.close()
            helper.pipe = None

    def _remove(self, helper: Helper) -> None:
        self._close(helper)
        if self._helpers.get(helper.attempt) is helper:
            del self._helpers[helper.attempt]
