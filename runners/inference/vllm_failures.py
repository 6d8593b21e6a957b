"""Turns vLLM's failures into one-line errors of the right kind, also those in its engine's processes.

Such a process writes the cause to the log only; the exception in the task's process does not contain it.
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
"""Exceptions that vLLM raises for arguments and models that it does not support."""
_NOT_FINITE = "NaNs detected in logits"
_ELSEWHERE = "root cause"
"""Contained in all messages of vLLM that only report the failure of another process."""
_RAISED = re.compile(
    r"(?:\([^)]*\) )?(?:[A-Z]+ \S+ \S+ \[[^\]]*\] )?(?P<kind>[\w.]*(?:Error|Exception)): (?P<text>.*\S)"
)
_MOST_BYTES = 4 * 2**20


class Logs:
    """Output of this process's stdout and stderr since construction; on a node both are files."""

    def __init__(self) -> None:
        self._since = {fd: os.fstat(fd).st_size for fd in (1, 2) if stat.S_ISREG(os.fstat(fd).st_mode)}

    def cause(self) -> tuple[str, str] | None:
        """Type and text of the first logged exception that is not about another process."""
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
        logs: constructed before the start.
    """
    kind, text = _cause(error, logs)
    line = first_line(text)
    if any(each in text for each in _OUT_OF_MEMORY):
        return GpuOutOfMemory(f"{source.where}: {source.shown!r} does not fit: {line}")
    if kind in _TASKS_OWN:
        return BadRequest(f"{WHERE}: vLLM cannot run {source.shown!r} so: {line}")
    return RunnerError(f"vLLM's engine did not start: {line}; see the log")


def step_failure(error: Exception, logs: Logs, when_not_finite: str | None = None) -> RunnerError:
    """Why the engine stopped while generating.

    Args:
        when_not_finite: the message where the model computed NaN.
    """
    kind, text = _cause(error, logs)
    if _NOT_FINITE in text and when_not_finite is not None:
        return BadRequest(when_not_finite)
    if any(each in text for each in _OUT_OF_MEMORY):
        return GpuOutOfMemory(f"the GPU's memory ran out while generating: {first_line(text)}")
    return RunnerError(f"vLLM's engine failed while generating: {kind}: {first_line(text)}")


def _cause(error: Exception, logs: Logs) -> tuple[str, str]:
    cause = logs.cause() if _ELSEWHERE in str(error) else None
    if cause is not None:
        return cause
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return next((kind for kind in kinds if kind in _TASKS_OWN), kinds[0]), str(error)


def explain(problem: Any, source: Source, asked: Sequence[str]) -> str:
    """One of pydantic's errors as a line about the argument that caused it, if known.

    Args:
        asked: the task's own arguments.
    """
    text = first_line(problem["msg"].removeprefix("Value error, "))
    named = str(problem["loc"][0]) if problem["loc"] else ""
    causes = [name for name in asked if name == named] or [name for name in asked if name in text]
    if causes:
        return f"{WHERE}.{causes[0]}: {text}"
    if named and asked:
        return f"{WHERE}: {named}: {text} (given: {', '.join(asked)})"
    return f"{source.where}: {source.shown!r}: {text}"


def first_line(error: object) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 300 else f"{text[:299]}…"
