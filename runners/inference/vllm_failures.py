"""What went wrong in vLLM, in one line and of the right kind, also where it went wrong in a process of its engine.

Such a process tells its cause only to the log; what reaches the task is that there is one.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from typing import Any

from runners.api import BadRequest, RunnerError
from runners.inference.engine import GpuOutOfMemory
from runners.inference.vllm_args import WHERE
from runners.models.sources import Source

_OUT_OF_MEMORY = (
    "out of memory",
    "No available memory for the cache blocks",
    "is less than desired GPU memory utilization",
)
_TASKS_OWN = frozenset({"ValueError", "TypeError", "KeyError", "AssertionError", "NotImplementedError"})
"""What vLLM raises where it is given something that it cannot do."""
_NOT_FINITE = "NaNs detected in logits"
_ELSEWHERE = "root cause"
"""In all of vLLM's messages that only say that another process failed."""
_RAISED = re.compile(
    r"(?:\([^)]*\) )?(?:[A-Z]+ \S+ \S+ \[[^\]]*\] )?(?P<kind>[\w.]*(?:Error|Exception)): (?P<text>.*\S)"
)
_MOST_BYTES = 4 * 2**20


class Logs:
    """What is written to this process's stdout and stderr after it is made; on a node both are files."""

    def __init__(self) -> None:
        self._since = {fd: os.fstat(fd).st_size for fd in (1, 2) if stat.S_ISREG(os.fstat(fd).st_mode)}

    def cause(self) -> tuple[str, str] | None:
        """The first exception in there that says more than that another process failed: its kind and its text."""
        for fd, since in self._since.items():
            with open(f"/proc/self/fd/{fd}", "rb") as log:
                log.seek(min(since, os.fstat(fd).st_size))
                for line in log.read(_MOST_BYTES).decode(errors="replace").splitlines():
                    match = _RAISED.fullmatch(line)
                    if match is not None and _ELSEWHERE not in match["text"]:
                        return match["kind"].rpartition(".")[2], match["text"]
        return None


def start_failure(error: Exception, source: Source, logs: Logs) -> RunnerError:
    """Why the engine did not start.

    Args:
        logs: made before it was started.
    """
    kind, text = _told(error, logs)
    line = first_line(text)
    if any(each in text for each in _OUT_OF_MEMORY):
        return GpuOutOfMemory(f"{source.where}: {source.shown!r} does not fit: {line}")
    if kind in _TASKS_OWN:
        return BadRequest(f"{WHERE}: vLLM cannot run {source.shown!r} so: {line}")
    return RunnerError(f"vLLM's engine did not start: {line}; the log has the whole story")


def step_failure(error: Exception, logs: Logs, when_not_finite: str | None = None) -> RunnerError:
    """Why it stopped while it generated.

    Args:
        when_not_finite: the message where the model computed NaN.
    """
    kind, text = _told(error, logs)
    if _NOT_FINITE in text and when_not_finite is not None:
        return BadRequest(when_not_finite)
    if any(each in text for each in _OUT_OF_MEMORY):
        return GpuOutOfMemory(f"the GPU's memory ran out while generating: {first_line(text)}")
    return RunnerError(f"vLLM's engine failed while generating: {kind}: {first_line(text)}")


def _told(error: Exception, logs: Logs) -> tuple[str, str]:
    cause = logs.cause() if _ELSEWHERE in str(error) else None
    if cause is not None:
        return cause
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return next((kind for kind in kinds if kind in _TASKS_OWN), kinds[0]), str(error)


def explain(problem: Any, source: Source, asked: Sequence[str]) -> str:
    """One of pydantic's problems as a line about the argument that it is down to, as far as that can be told.

    Args:
        asked: the arguments that the task itself gave.
    """
    text = first_line(problem["msg"].removeprefix("Value error, "))
    named = str(problem["loc"][0]) if problem["loc"] else ""
    guilty = [name for name in asked if name == named] or [name for name in asked if name in text]
    if guilty:
        return f"{WHERE}.{guilty[0]}: {text}"
    if named and asked:
        return f"{WHERE}: {named}: {text} (given: {', '.join(asked)})"
    return f"{source.where}: {source.shown!r}: {text}"


def first_line(error: object) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 300 else f"{text[:299]}…"
