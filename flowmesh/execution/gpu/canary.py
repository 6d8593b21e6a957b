"""Runs the GPU canary: a child on a slot's GPUs that must compute correctly before they get tasks again."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

from flowmesh.errors import LaunchError
from flowmesh.execution.housekeeping.removal import remove_tree
from flowmesh.execution.layout import OOM_SCORE_ADJ, Layout
from flowmesh.node.slots import SlotPlan
from flowmesh.processes import environ
from flowmesh.processes.helper import Helpers
from flowmesh.processes.limits import Limits
from flowmesh.processes.protocol import Fork
from flowmesh.tasks.catalogue import DEFAULT, Catalogue
from flowmesh.tasks.verdicts import describe_exit

TIMEOUT_S = 120.0
FIRST_ATTEMPT = 1 << 40
"""Canaries have attempt numbers too; far above any of the journal's."""


class Canaries:
    """
    Args:
        entry: `module:function` of the canary (`gpu.canary`).
    """

    def __init__(self, helpers: Helpers, layout: Layout, catalogue: Catalogue, entry: str) -> None:
        self._helpers = helpers
        self._layout = layout
        self._environment = _with_torch(catalogue)
        self._entry = entry
        self._attempts = itertools.count(FIRST_ATTEMPT + int(time.time()))

    async def run(self, plan: SlotPlan) -> str:
        """Run it on the slot's GPUs. Takes TIMEOUT_S at most, an import aside.

        Returns:
            why it failed; empty if it passed.
        """
        attempt = next(self._attempts)
        log = self._layout.log_dir.resolve() / f"canary-{plan.name}.log"
        try:
            await asyncio.to_thread(self._prepare, attempt, log)
            await self._helpers.warm(self._environment)
            child = self._helpers.run(self._environment, self._fork(attempt, plan, log))
            exit_ = await asyncio.wait_for(child, TIMEOUT_S)
            why = "" if exit_.code == 0 else describe_exit(exit_)
        except TimeoutError:
            why = f"it did not end within {TIMEOUT_S:.0f} s"
        except (LaunchError, OSError) as error:
            why = str(error)
        finally:
            await asyncio.to_thread(remove_tree, self._layout.tmp(attempt))
        return f"its canary ({self._entry}) failed: {why}; see {log}" if why else ""

    def _prepare(self, attempt: int, log: Path) -> None:
        folder = self._layout.tmp(attempt)
        remove_tree(folder)
        folder.mkdir(parents=True, mode=0o700)
        self._layout.give(folder)
        log.write_bytes(b"")

    def _fork(self, attempt: int, plan: SlotPlan, log: Path) -> Fork:
        layout = self._layout
        tmp = str(layout.tmp(attempt))
        return Fork(
            attempt=attempt,
            target=self._entry,
            spool=tmp,
            cwd=str(layout.work_dir),
            stdout=str(log),
            stderr=str(log),
            env=environ.for_task(
                layout.task_env, task_env={}, tmp_dir=tmp, threads=1, gpus=plan.gpus, mark=layout.mark_of(attempt)
            ),
            limits=Limits(
                oom_score_adj=OOM_SCORE_ADJ,
                uid=None if layout.owner is None else layout.owner.uid,
                gid=None if layout.owner is None else layout.owner.gid,
            ),
        )


def _with_torch(catalogue: Catalogue) -> str:
    """An environment that has torch: the default one, if it has."""
    able = {each.environment for each in catalogue.offered.values() if "torch" in each.requires}
    return DEFAULT if DEFAULT in able or not able else min(able)
