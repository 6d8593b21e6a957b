"""Collects the warnings that a task logs, for `warnings` of its result."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from runners.api import Context

MAX_WARNINGS = 100
MAX_CHARS = 2000


class Collector(logging.Handler):
    """Appends each different warning to a list, as one line.

    Args:
        found: the list.
    """

    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno != logging.WARNING:
            return  # an error is the task's error, not a warning
        text = " ".join(record.getMessage().split())[:MAX_CHARS]
        if text not in self._found and len(self._found) < MAX_WARNINGS:
            self._found.append(text)


@contextlib.contextmanager
def collected(ctx: Context) -> Iterator[None]:
    """Collect what is logged as a warning to `ctx.log` in `ctx.warnings`."""
    collector = Collector(ctx.warnings)
    ctx.log.addHandler(collector)
    try:
        yield
    finally:
        ctx.log.removeHandler(collector)
