"""What a trainer is built from, in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from runners.api import Context
from runners.training.checkpoints import Start
from runners.training.devices import Device, Layout
from runners.training.inputs import Inputs
from runners.training.plan import Plan
from runners.training.progress import Meter
from runners.training.ranks import Place


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One rank's run, before anything is loaded."""

    plan: Plan
    ctx: Context
    fetched: Inputs
    layout: Layout
    place: Place
    device: Device
    meter: Meter
    start: Start


class TrainingJob(Protocol):
    """A trainer with everything loaded."""

    start: Start
    """Where it began."""
    dataset_size: int
    """Rows that are trained on."""
    dropped: dict[str, int]
    """Rows that were left out, by reason."""
    eval_size: int
    """Rows that are evaluated on."""
    samples_a_step: int
    """Rows (of ppo: completions) behind one step, on all ranks."""

    @property
    def best_step(self) -> int | None:
        """The step whose weights are saved, where the best ones are loaded at the end."""

    def train(self) -> None:
        """Until the last step, or until the meter says stop."""

    def save(self) -> None:
        """Write the folder of the result. A collective."""

    def describe(self) -> dict[str, Any]:
        """What only this trainer knows, for the result's metrics."""
