"""What is wrong with environments: those whose fork server does not start, and those that are not safe to fork."""

from __future__ import annotations

import time
from pathlib import Path

from loguru import logger

from flowmesh.processes.server_client import EnvironmentBroken

BROKEN_FOR_S = 30.0
"""After a failed start, launches in that environment fail at once for this long."""


class EnvironmentFaults:
    def __init__(self) -> None:
        self._broken: dict[str, tuple[float, str]] = {}
        """By environment: when its server failed to start (monotonic), and why."""
        self._unsafe: dict[str, str] = {}
        """By environment: why a process that has imported its libraries must not be forked."""

    def failed(self, environment: str, message: str) -> EnvironmentBroken:
        """Remember a failed start."""
        self._broken[environment] = (time.monotonic(), message)
        return EnvironmentBroken(message)

    def try_again(self, environment: str) -> None:
        """Start the environment's server at the next request, however short ago the last start failed."""
        if environment in self._broken:
            self._broken[environment] = (-BROKEN_FOR_S, self._broken[environment][1])

    def started(self, environment: str) -> None:
        self._broken.pop(environment, None)

    def check(self, environment: str) -> None:
        """
        Raises:
            EnvironmentBroken: the environment's server failed to start a moment ago.
        """
        since, message = self._broken.get(environment, (0.0, ""))
        if message and time.monotonic() - since < BROKEN_FOR_S:
            raise EnvironmentBroken(message)

    def mark_unsafe(self, environment: str, reason: str) -> None:
        """Remember, and log once, that the environment's server must do without its imports."""
        if environment not in self._unsafe:
            self._unsafe[environment] = reason
            logger.bind(environment=environment).warning(
                "environment {} is not safe to fork ({}): each of its tasks imports its libraries itself, which takes "
                "seconds",
                environment,
                reason,
            )

    def is_unsafe(self, environment: str) -> bool:
        return environment in self._unsafe

    def clear(self) -> None:
        self._broken.clear()
        self._unsafe.clear()

    def warnings(self) -> dict[str, str]:
        """What is wrong, by environment."""
        broken = {name: message for name, (_, message) in self._broken.items()}
        return broken | {name: f"no preload: {reason}" for name, reason in self._unsafe.items()}


def last_line(log: Path) -> str:
    """The last line that a server wrote to its log: most often the error that ended it."""
    try:
        lines = log.read_text(errors="replace").split("\n")[-50:]
    except OSError:
        return "no log"
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it wrote nothing")
