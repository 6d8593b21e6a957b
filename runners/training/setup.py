"""Inputs of a trainer, and the interface of a loaded one."""

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
    """One rank's run before anything is loaded."""

    plan: Plan
    ctx: Context
    fetched: Inputs
    layout: Layout
    place: Place
    device: Device
    meter: Meter
    start: Start
    parts_together: bool = True
    """Whether the parts of a checkpoint that ranks write come to lie in one folder."""


class TrainingJob(Protocol):
    """A trainer with everything loaded."""

    start: Start
    """Where the run started."""
    dataset_size: int
    """Rows to train on, without dropped ones."""
    dropped: dict[str, int]
    """Number of dropped rows by reason."""
    truncated: int
    """Rows of `dataset_size` that were cut to max_seq_length."""
    eval_size: int
    """Rows to evaluate on."""
    samples_a_step: int
    """Rows (in ppo: completions) for one step on all ranks."""

    @property
    def best_step(self) -> int | None:
        """Step of the saved weights where the best ones are loaded at the end, else None."""

    def train(self) -> None:
        """Train until the last step, or until the meter stops the run."""

    def save(self) -> None:
        """Write the result's folder. A collective."""

    def describe(self) -> dict[str, Any]:
        """Metrics of this trainer alone."""
