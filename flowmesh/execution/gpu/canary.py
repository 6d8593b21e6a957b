"""Runs the GPU canary: a child on a slot's GPUs that has to compute well before they are trusted with tasks again.

It is forked like a task, from the server of an environment that has torch, under an attempt number that no task has.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from flowmesh.errors import LaunchError
from flowmesh.execution import layout as files
from flowmesh.messages.job import Exit
from flowmesh.node.slots import SlotPlan
from flowmesh.processes import environ
from flowmesh.processes.limits import Limits
from flowmesh.processes.pipe import Pipe
from flowmesh.processes.protocol import Fork
from flowmesh.tasks.types import DEFAULT
from flowmesh.tasks.verdicts import describe_exit

if TYPE_CHECKING:
    from flowmesh.execution.executor import Executor

TIMEOUT_S = 120.0
_FIRST = 1 << 40
"""Far above any attempt of the journal's."""


class Canaries:
    """Its four `on_…` are the fleet's callbacks, for attempts that are `in` it."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._next = _FIRST + int(time.time())
        self._ends: dict[int, asyncio.Future[str]] = {}
        self._pipes: dict[int, Pipe] = {}

    def __contains__(self, attempt: int) -> bool:
        return attempt in self._ends

    async def run(self, plan: SlotPlan) -> str:
        """Why it did not end well on these GPUs; empty where it did. Takes TIMEOUT_S at most, an import aside."""
        executor, layout = self._executor, self._executor.layout
        attempt, self._next = self._next, self._next + 1
        log = layout.log_dir.resolve() / f"canary-{plan.name}.log"
        fork = self._fork(attempt, plan, str(log))
        ended = self._ends[attempt] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.to_thread(_make_room, layout, attempt, str(log))
            await executor.fleet.launch(self._lane(), fork, lambda _server: None)
            why = await asyncio.wait_for(asyncio.shield(ended), TIMEOUT_S)
        except TimeoutError:
            executor.fleet.kill(attempt)
            why = f"it did not end within {TIMEOUT_S:.0f} s"
        except (LaunchError, OSError) as error:
            why = str(error)
        finally:
            del self._ends[attempt]
            if (pipe := self._pipes.pop(attempt, None)) is not None:
                pipe.close()
            await asyncio.to_thread(files.remove_tree, layout.tmp(attempt))
        if not why:
            return ""
        return f"its canary ({executor.settings.gpu.canary}) failed: {why}; see {log}"

    def on_forked(self, attempt: int, pipe: Pipe) -> None:
        self._pipes[attempt] = pipe

    def on_failed(self, attempt: int, message: str) -> None:
        self._end(attempt, message)

    def on_gone(self, attempt: int, exit_: Exit) -> None:
        self._executor.fleet.forget(attempt)
        self._end(attempt, "" if exit_.code == 0 else describe_exit(exit_))

    def _end(self, attempt: int, why: str) -> None:
        if not self._ends[attempt].done():
            self._ends[attempt].set_result(why)

    def _lane(self) -> str:
        """The environment that has torch: the default one where it has."""
        offered = self._executor.catalogue.offered.values()
        able = {each.environment for each in offered if "torch" in each.requires}
        return DEFAULT if DEFAULT in able or not able else min(able)

    def _fork(self, attempt: int, plan: SlotPlan, log: str) -> Fork:
        layout = self._executor.layout
        tmp = str(layout.tmp(attempt))
        home = layout.base_env if layout.owner is None else {**layout.base_env, "HOME": layout.owner.home}
        return Fork(
            attempt=attempt,
            target=self._executor.settings.gpu.canary,
            spool=tmp,
            cwd=str(layout.work_dir),
            stdout=log,
            stderr=log,
            env=environ.for_task(
                home, task_env={}, tmp_dir=tmp, threads=1, gpus=plan.gpus, mark=layout.mark_of(attempt)
            ),
            limits=Limits(
                oom_score_adj=files.OOM_SCORE_ADJ,
                uid=None if layout.owner is None else layout.owner.uid,
                gid=None if layout.owner is None else layout.owner.gid,
            ),
        )


def _make_room(layout: files.Layout, attempt: int, log: str) -> None:
    folder = layout.tmp(attempt)
    files.remove_tree(folder)
    folder.mkdir(parents=True, mode=0o700)
    files.give(layout, folder)
    open(log, "wb").close()  # what it says is about this time
