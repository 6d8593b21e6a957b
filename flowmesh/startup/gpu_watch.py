"""GPUs that were not there when the node started: it says so, looks again, and restarts in place when they are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from flowmesh.errors import FlowMeshError
from flowmesh.execution.conditions import Conditions, Fault
from flowmesh.node.devices import Inventory
from flowmesh.node.nvml.look import look_again
from flowmesh.node.slots import SlotPlan
from flowmesh.startup.preflight import Fitted

FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0


class GpuWatch:
    """
    Args:
        fitted: what the node has made of its inventory.
        fit: the same for another inventory; raises FlowMeshError.
        restart: replaces the supervisor by one with these slots; tasks run on.
        wait_s: how long tasks wait that need the GPUs.
    """

    def __init__(
        self,
        conditions: Conditions,
        fitted: Fitted,
        *,
        fit: Callable[[Inventory], Fitted],
        restart: Callable[[Fitted], Awaitable[None]],
        wait_s: float,
    ) -> None:
        self._conditions = conditions
        self._fitted = fitted
        self._fit = fit
        self._restart = restart
        self._fault = Fault(
            name="GPUs of the node",
            probe=self._probe,
            wait_s=wait_s,
            worker_ids=tuple(plan.worker_id for plan in fitted.slots if plan.missing),
            concerns=lambda run: not run.accepted.type.is_light,
            first_s=FIRST_PAUSE_S,
            longest_s=LONGEST_PAUSE_S,
        )

    def begin(self, inventory: Inventory) -> None:
        """Look again from now on, if the node's first inventory lacks something."""
        if reason := _lacking(inventory, self._fitted.slots):
            self._conditions.report(self._fault, reason)

    async def _probe(self) -> str:
        inventory = await asyncio.to_thread(look_again)
        try:
            fitted = await asyncio.to_thread(self._fit, inventory)
            lacking = _lacking(inventory, fitted.slots)
            if not set(fitted.gpus) - set(self._fitted.gpus):
                return lacking
            await self._restart(fitted)
        except FlowMeshError as error:
            return f"GPUs came back, and the node cannot take them: {error}"
        return f"GPUs came back: the node restarts with them{'; ' if lacking else ''}{lacking}"


def _lacking(inventory: Inventory, plans: Iterable[SlotPlan]) -> str:
    """What is not there; empty if nothing is known to be missing."""
    named = dict.fromkeys(entry for plan in plans for entry in plan.missing)
    which = f"CUDA_VISIBLE_DEVICES or slots name GPU {', '.join(named)}, which is not there" if named else ""
    return "; ".join(part for part in (which, *inventory.unusable) if part)
