"""The end of a node: it takes no more tasks, and ends when it has none left. By a signal or an operator.

An operator's drain is kept in the journal, so that a restart continues it, until all tasks have ended or it is taken
back. A forced stop (`now`) ends in bounded time, whatever tasks and disks do.
"""

from __future__ import annotations

import asyncio

from loguru import logger

from flowmesh.errors import LaunchError
from flowmesh.execution.executor import Executor
from flowmesh.execution.launch.node_folders import JOURNAL
from flowmesh.node.systemd import Notifier
from flowmesh.orchestrator.registration import Registration
from flowmesh.tasks.journal import JournalError

MODES = ("finish", "checkpoint", "now")
"""From the softest to the hardest."""
FACT = "drain"
"""The journal's name for an operator's drain; its value is the mode."""
FORCED_S = 60.0
"""How long a forced stop waits for the tasks' ends."""
FORCED_NO_JOURNAL_S = 10.0
"""The same while no end can be written down: long enough for the tasks' processes to be killed."""


class Drain:
    """
    Args:
        stop: set when the drain begins, cleared when it is taken back.
        limit_s: how long running tasks may take (`processes.drain_timeout_s`).
        on_sigterm: the mode of a drain by SIGTERM.
    """

    def __init__(
        self,
        executor: Executor,
        registration: Registration,
        notifier: Notifier,
        stop: asyncio.Event,
        *,
        limit_s: float,
        on_sigterm: str = "finish",
    ) -> None:
        self.mode: str | None = None
        """None: the node does not drain."""
        self._executor = executor
        self._registration = registration
        self._notifier = notifier
        self._stop = stop
        self._limit_s = limit_s
        self._on_sigterm = on_sigterm
        self._taken_back = asyncio.Event()
        self._forced = asyncio.Event()
        self._signalled = False
        self._final = ""
        """Why the node ends by itself; empty: it does not."""

    @property
    def kept(self) -> str | None:
        """The mode of an operator's drain that an earlier supervisor began and did not finish."""
        return self._executor.journal.find_fact(FACT)

    def begin(self, mode: str) -> None:
        """Drain in this mode, then end. A later call has an effect only if its mode is harder."""
        if self.mode is not None and MODES.index(mode) <= MODES.index(self.mode):
            return
        self.mode = mode
        self._taken_back.clear()
        self._stop.set()
        logger.bind(mode=mode, tasks=len(self._executor.runs)).info("draining")
        self._notifier.send(STATUS=f"draining ({mode})")
        self._registration.drain()
        self._executor.drain(mode)
        if mode == "now":
            self._forced.set()

    def on_sigterm(self) -> None:
        """The first one drains. One during a drain stops the tasks, unless SIGTERM means a checkpoint.

        Slurm sends two within milliseconds where it ends a job: one to the step, one through srun.
        """
        first, self._signalled = self.mode is None, True
        self.begin(self._on_sigterm if first or self._on_sigterm == "checkpoint" else "now")

    def on_sigint(self) -> None:
        """The first one drains, one during a drain stops the tasks."""
        first, self._signalled = self.mode is None, True
        self.begin(self._on_sigterm if first else "now")

    def on_warning(self) -> None:
        """SIGUSR1: the node ends soon (`sbatch --signal=USR1@…`). Another one changes nothing."""
        self._signalled = True
        self.begin("checkpoint")

    def at_end(self, mode: str) -> None:
        """Drain because the node's time is over; not kept, and not taken back."""
        self._final = "the node's time is over"
        self.begin(mode)

    def by_operator(self, mode: str) -> None:
        """Drain in this mode, also after a restart."""
        self.begin(mode)
        self._keep(self.mode)

    def take_back(self) -> None:
        """Take tasks again. What was sent back or asked to stop meanwhile stays so.

        Raises:
            LaunchError: the node does not drain, or a signal or its own end ends it.
        """
        if self.mode is None:
            raise LaunchError("the node is not draining")
        if self._signalled:
            raise LaunchError("a signal told the node to end; start it again when it has ended")
        if self._final:
            raise LaunchError(f"{self._final} (node.ends_at, node.exit_when_idle_s); start it again when it has ended")
        self._keep(None)
        self.mode = None
        self._stop.clear()
        self._forced.clear()
        self._taken_back.set()
        logger.info("drain taken back: the node takes tasks again")
        self._notifier.send(STATUS="running")
        self._executor.resume()
        self._registration.take_tasks_again()

    async def ended(self) -> bool:
        """Wait until no task is left; False if the drain was taken back."""
        waits = [asyncio.create_task(wait) for wait in (self._drained(), self._taken_back.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self._taken_back.is_set():
                return False
            await waits[0]
        finally:
            for each in waits:
                each.cancel()
        if not self._signalled:  # a restart in the midst of it does not end it
            self._keep(None)
        return True

    async def _drained(self) -> None:
        """After `limit_s` the tasks are stopped."""
        idle, forced = asyncio.create_task(self._executor.idle()), asyncio.create_task(self._forced.wait())
        try:
            await asyncio.wait([idle, forced], timeout=self._limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not idle.done() and not forced.done():
                logger.warning("drain took more than {} s: stopping the running tasks", self._limit_s)
                self.begin("now")
            no_journal = self._executor.parts.conditions.holds(JOURNAL)
            await asyncio.wait([idle], timeout=FORCED_NO_JOURNAL_S if no_journal else FORCED_S)
            if not idle.done():
                left = len(self._executor.runs)
                logger.error("{} tasks could not be ended: the next supervisor continues with them", left)
        finally:
            idle.cancel()
            forced.cancel()

    def _keep(self, mode: str | None) -> None:
        try:
            self._executor.journal.set_fact(FACT, mode)
        except JournalError as error:
            logger.error("a restart will not know about the drain: {}", error)
            self._executor.on_journal_error(error)
