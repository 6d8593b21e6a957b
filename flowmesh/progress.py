"""Progress of a `command` or `python` task, reported by its own program: `from flowmesh.progress import report`.

Needs only the standard library, and does nothing outside of a task, so a program may call it wherever it runs. A
program in another language writes the same lines itself, to the descriptor that FLOWMESH_PROGRESS_FD names: one JSON
object a line, at most LINE_BYTES, such as `{"done": 3, "total": 10, "unit": "steps", "loss": 0.3}` or
`{"phase": "train"}`.
"""

from __future__ import annotations

import contextlib
import json
import os

FIFO = "FLOWMESH_PROGRESS"
"""Variable with the path of the pipe that lines are written to."""
DESCRIPTOR = "FLOWMESH_PROGRESS_FD"
"""Variable with a descriptor of the same pipe, which the program's first process inherits."""
LINE_BYTES = 4096
"""What the kernel writes in one piece, so that lines of several processes do not mix."""


def report(
    done: float | None = None, total: float | None = None, unit: str = "", *, phase: str = "", **metrics: float
) -> bool:
    """Report how far the task is. It never blocks and never raises for what the node does.

    Args:
        done: how much is done, in `unit`s.
        total: None if unknown.
        unit: such as `steps`.
        phase: begins a phase; its seconds are in the task's event.
        metrics: numbers such as loss=0.3; the last ones are in the result.

    Returns:
        False if the line was dropped: this is no such task, or the node reads slowly.

    Raises:
        TypeError: a value is not a number.
        ValueError: the line is longer than LINE_BYTES.
    """
    words: dict[str, float | str] = {name: float(value) for name, value in metrics.items()}
    if done is not None:
        words["done"] = float(done)
    if total is not None:
        words["total"] = float(total)
    words |= {name: str(text) for name, text in (("unit", unit), ("phase", phase)) if text}
    line = json.dumps(words).encode() + b"\n"
    if len(line) > LINE_BYTES:
        raise ValueError(f"a progress line of {len(line)} bytes; at most {LINE_BYTES} fit")
    with contextlib.suppress(OSError, KeyError):
        fd = os.open(os.environ[FIFO], os.O_WRONLY | os.O_NONBLOCK)
        try:
            return os.write(fd, line) == len(line)
        finally:
            os.close(fd)
    return False
