"""Steps that could not be written to the journal: they have not happened, and wait in order until it can be written."""

from __future__ import annotations

from collections.abc import Callable


class Unwritten:
    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._steps)

    def add(self, step: Callable[[], None]) -> None:
        self._steps.append(step)

    def repeat(self) -> None:
        """Do them, in order. One that fails again, and all after it, wait again."""
        steps, self._steps = self._steps, []
        for step in steps:
            step()
