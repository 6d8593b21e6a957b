"""Shares the minutes of a run out among its steps, by priority: a step never takes what a more important one needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a step asks for, in seconds."""

    name: str
    priority: int
    """1 is the most important."""
    most_s: float
    least_s: float
    """Below this it is skipped."""


def seconds_for(step: Share, later: Sequence[Share], left_s: float) -> float:
    """The seconds that a step may take now; 0 where it has to be skipped.

    Steps of a higher priority that come later keep all that they ask for, those of the same one their least.

    Args:
        left_s: of the whole run.
    """
    kept_s = sum(each.most_s for each in later if each.priority < step.priority)
    kept_s += sum(each.least_s for each in later if each.priority == step.priority)
    seconds = min(step.most_s, left_s - kept_s)
    return seconds if seconds >= step.least_s else 0.0
