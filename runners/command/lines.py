"""Reads the progress that a program reports, a JSON object a line, and passes it on to the node."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flowmesh.progress import LINE_BYTES
from runners.api import Context

READ_BYTES = 64 * 1024
MOST_METRICS = 32
NAME_CHARS = 64
LARGEST = 1e300
_OWN = ("done", "total", "unit", "phase")


class Lines:
    """Both ends of the pipe. What is written to it is read at once, so the program hardly ever waits.

    Args:
        fifo: made by the caller.
    """

    def __init__(self, fifo: Path) -> None:
        # Also open for writing: else it is at its end whenever the last process that reports closes it.
        self.fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.writer = os.open(fifo, os.O_WRONLY | os.O_CLOEXEC)
        """For the program. One of its own, since programs do not expect a descriptor that does not block."""
        self._rest = b""
        self._too_long = False
        self.bad = 0
        """Lines that could not be used."""
        self.seen = False
        self.metrics: dict[str, float] = {}
        """The last value of each."""

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.writer)

    def read(self, ctx: Context) -> None:
        """Take in what has been written.

        Raises:
            Cancelled: the node asked the task to stop.
        """
        while data := self._more():
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                if self._too_long:
                    self._too_long = False
                elif line.strip():
                    self._take(ctx, line)
            if len(self._rest) > LINE_BYTES:
                self.bad += not self._too_long
                self._rest, self._too_long = b"", True
            if len(data) < READ_BYTES:
                return

    def _more(self) -> bytes:
        try:
            return os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return b""

    def _take(self, ctx: Context, line: bytes) -> None:
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            self.bad += 1
            return
        self.seen = True
        if isinstance(phase := said.get("phase"), str) and phase.strip():
            ctx.phase(phase.strip()[:NAME_CHARS])
        metrics = {
            str(name)[:NAME_CHARS]: number
            for name, value in list(said.items())[: MOST_METRICS + len(_OWN)]
            if name not in _OWN and (number := _number(value)) is not None
        }
        for name, value in metrics.items():
            if name in self.metrics or len(self.metrics) < MOST_METRICS:
                self.metrics[name] = value
        done, total, unit = _number(said.get("done")), _number(said.get("total")), said.get("unit")
        if done is not None or metrics:
            shown = unit[:NAME_CHARS] if isinstance(unit, str) else ""
            ctx.progress(done or 0.0, total if total and total > 0 else None, shown, **metrics)


def _number(value: Any) -> float | None:
    """None if it is no usable number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        return None
    return float(value)
