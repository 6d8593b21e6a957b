"""Environments that do not work as faults of the node: their task types are not offered until they do."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Set

from flowmesh.errors import LaunchError
from flowmesh.execution.conditions import Conditions, Fault
from flowmesh.execution.launch.preparation import task_limits
from flowmesh.execution.layout import Layout
from flowmesh.execution.run import Run
from flowmesh.messages.job import Exit
from flowmesh.processes import environ
from flowmesh.processes.helper import Helpers
from flowmesh.processes.limits import Limits
from flowmesh.processes.protocol import Fork
from flowmesh.processes.server_pool import ServerPool
from flowmesh.tasks import machine
from flowmesh.tasks.catalogue import DELIVERY, LIGHT
from flowmesh.tasks.verdicts import describe_exit

LONGEST_PAUSE_S = 60.0
"""Between two probes: each starts an interpreter and imports the environment's libraries."""
LONGEST_LIGHT_S = 10.0
"""The same for environments without heavy libraries."""
FORK_TIMEOUT_S = 60.0
LOOK_S = 0.2
"""How often a delivery that waits for its environment looks."""
PROBE_ENTRY = "flowmesh.processes.child_main:nothing"
FIRST_ATTEMPT = 1 << 41
"""Probes have attempt numbers too; above those of canaries."""


class EnvironmentConditions:
    """
    Args:
        wait_s: how long tasks wait for their environment.
    """

    def __init__(
        self, *, pool: ServerPool, helpers: Helpers, layout: Layout, conditions: Conditions, wait_s: float
    ) -> None:
        self._pool = pool
        self._helpers = helpers
        self._layout = layout
        self._conditions = conditions
        self._wait_s = wait_s
        self._faults: dict[str, Fault] = {}
        self._attempts = itertools.count(FIRST_ATTEMPT + int(time.time()))

    def met(self, run: Run, reason: str) -> machine.Event:
        """A task found that its environment does not work; returns the task's next event."""
        return self._conditions.met(run, self._fault(run.accepted.type.environment), reason)

    def report(self, environment: str, reason: str) -> None:
        """Something else than a task found that an environment does not work."""
        self._conditions.report(self._fault(environment), reason)

    async def works(self, environment: str, stopped: Callable[[], bool], until: float) -> bool:
        """Wait until the environment works again; False if `stopped` says so, or it does not by `until` (monotonic)."""
        name = self._fault(environment).name
        while self._conditions.holds(name) and not stopped() and time.monotonic() < until:
            await asyncio.sleep(LOOK_S)
        return not self._conditions.holds(name) and not stopped()

    @property
    def wait_s(self) -> float:
        """How long what needs an environment waits for it."""
        return self._wait_s

    @property
    def broken(self) -> Set[str]:
        """The environments that do not work now."""
        return {name for name, fault in self._faults.items() if self._conditions.holds(fault.name)}

    def _fault(self, environment: str) -> Fault:
        if (fault := self._faults.get(environment)) is None:
            fault = self._faults[environment] = Fault(
                name=f"environment {environment}",
                probe=lambda: self._probe(environment),
                wait_s=self._wait_s,
                # without deliveries, no result of any task would reach anybody
                concerns=None if environment == DELIVERY else lambda run: run.accepted.type.environment == environment,
                partial=environment != DELIVERY,
                longest_s=LONGEST_LIGHT_S if environment in (LIGHT, DELIVERY) else LONGEST_PAUSE_S,
            )
        return fault

    async def _probe(self, environment: str) -> str:
        """Have a child forked that does nothing: imports, fork, cgroup and limits are those of a task."""
        self._pool.try_again(environment)
        if problem := await self._pool.await_server(environment):
            return problem
        try:
            child = self._helpers.run(environment, self._fork(environment))
            exit_: Exit = await asyncio.wait_for(child, FORK_TIMEOUT_S)
        except TimeoutError:
            return f"environment {environment}: a child that does nothing did not end in {FORK_TIMEOUT_S:.0f} s"
        except LaunchError as error:
            return f"environment {environment}: {error}"
        if exit_.code == 0:
            return ""
        log = self._layout.log_dir / "probe.log"
        return f"environment {environment}: a child that does nothing ended with {describe_exit(exit_)}; see {log}"

    def _fork(self, environment: str) -> Fork:
        layout, attempt = self._layout, next(self._attempts)
        log = str(layout.log_dir / "probe.log")
        return Fork(
            attempt=attempt,
            target=PROBE_ENTRY,
            spool="/",
            cwd=str(layout.work_dir),
            stdout=log,
            stderr=log,
            env=environ.for_task(
                layout.task_env, task_env={}, tmp_dir="/tmp", threads=1, gpus=(), mark=layout.mark_of(attempt)
            ),
            limits=Limits() if environment == DELIVERY else task_limits(layout, private_shm=environment != LIGHT),
        )
