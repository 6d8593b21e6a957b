"""How a task ended: a closed set of kinds, each with its evidence and with whether a retry elsewhere makes sense."""

from __future__ import annotations

import enum
import signal
from typing import Any

import msgspec

from flowmesh.messages.job import EXIT_SETUP, Exit, Fault, Outcome


class Kind(enum.StrEnum):
    """`error_kind` of TASK_FAILED, and `ok`."""

    OK = "ok"
    ERROR = "error"
    BAD_REQUEST = "bad_request"
    MISSING_DEPENDENCY = "missing_dependency"
    CRASH = "crash"
    HOST_OOM = "host_oom"
    GPU_OOM = "gpu_oom"
    GPU_FAULT = "gpu_fault"
    HANG = "hang"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    DRAINED = "drained"
    DELIVERY_FAILED = "delivery_failed"
    SUPERVISOR_LOST = "supervisor_lost"
    NODE_FAULT = "node_fault"


_RETRYABLE = {
    Kind.MISSING_DEPENDENCY,
    Kind.CRASH,
    Kind.HOST_OOM,
    Kind.GPU_OOM,
    Kind.GPU_FAULT,
    Kind.HANG,
    Kind.DRAINED,
    Kind.SUPERVISOR_LOST,
    Kind.NODE_FAULT,
}
"""What depends on the worker, its libraries, its memory or its GPUs: another worker may succeed. A bad request or a
cancel would not change."""


class Stop(enum.StrEnum):
    """Why the node stops a task that has not ended by itself. Each value is a `Kind` too."""

    CANCEL = "cancelled"
    TIMEOUT = "timeout"
    HANG = "hang"
    DRAIN = "drained"
    GPU_FAULT = "gpu_fault"
    NODE_FAULT = "node_fault"
    """Its slot cannot run it, and it has not started."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How one attempt at a task ended."""

    kind: Kind
    message: str = ""
    """One line; empty for ok."""
    evidence: str = ""
    """What the kernel, the driver or the node observed."""
    exit: Exit | None = None

    @property
    def ok(self) -> bool:
        return self.kind is Kind.OK

    @property
    def retryable(self) -> bool:
        return self.kind in _RETRYABLE


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe_exit(exit_: Exit) -> str:
    if exit_.signal is not None:
        return f"killed by {signal_name(exit_.signal)}"
    return f"exit status {exit_.code}"


def stopped(stop: Stop, detail: str, *, exit_: Exit | None = None, evidence: str = "") -> Verdict:
    """The verdict on a task that the node stopped.

    Args:
        detail: the message; empty: the reason's own name.
    """
    return Verdict(kind=Kind(stop.value), message=detail or stop.value, exit=exit_, evidence=evidence)


def judge(
    exit_: Exit,
    outcome: Outcome | None,
    stop: Stop | None,
    *,
    stop_detail: str = "",
    gpu_fault: str = "",
    finished_frame: bool = False,
) -> Verdict:
    """The verdict on a child that is gone, from evidence only. Pure.

    A stop that the node requested decides, however the child reacted, unless the child had already succeeded: a result
    is not thrown away because a cancel arrived late.

    Args:
        outcome: what the child reported; None where it reported nothing.
        stop: why the node stopped it; None where it did not.
        gpu_fault: what the driver reported about the task's GPUs while it ran. It explains a crash or a plain error,
            but not a fault that the runner has named itself.
        finished_frame: the child said that its outcome is in the spool folder. Where there is none then, it was lost
            there, which is no fault of the task.
    """
    evidence = describe_exit(exit_)
    if exit_.oom_kills:
        evidence += f"; the kernel counted oom_kill +{exit_.oom_kills}"
    if outcome is not None and outcome.ok and exit_.code == 0:
        return Verdict(kind=Kind.OK, exit=exit_, evidence=evidence)
    if stop is not None:
        return stopped(stop, stop_detail, exit_=exit_, evidence=evidence)
    if exit_.oom_kills:
        message = "the kernel killed the task: out of host memory"
        return Verdict(kind=Kind.HOST_OOM, message=message, exit=exit_, evidence=evidence)
    if outcome is None and finished_frame:
        message = "the task had ended, and its outcome is gone from the node's spool folder, or cannot be read"
        return Verdict(kind=Kind.NODE_FAULT, message=message, exit=exit_, evidence=evidence)
    reported = None if outcome is None or outcome.ok else outcome.fault or Fault.ERROR
    if gpu_fault and reported in (None, Fault.ERROR, Fault.CRASH):
        message = f"GPU fault: {gpu_fault}" + (f" ({outcome.message})" if outcome is not None and reported else "")
        return Verdict(kind=Kind.GPU_FAULT, message=message, exit=exit_, evidence=f"{evidence}; {gpu_fault}")
    if reported is Fault.CANCELLED:
        message = "the task was terminated by a SIGTERM that the node did not send"
        return Verdict(kind=Kind.CRASH, message=message, exit=exit_, evidence=evidence)
    if outcome is not None and not outcome.ok:
        kind = _FAULTS[outcome.fault or Fault.ERROR]
        return Verdict(kind=kind, message=outcome.message, exit=exit_, evidence=evidence)
    if outcome is not None:
        message = f"the task reported success and then failed: {describe_exit(exit_)}"
    elif exit_.code == EXIT_SETUP:
        message = f"the task's process failed outside of the task (exit status {exit_.code}); see the task's log"
        return Verdict(kind=Kind.NODE_FAULT, message=message, exit=exit_, evidence=evidence)
    elif exit_.signal is not None:
        message = f"the task's process was killed by {signal_name(exit_.signal)}"
    else:
        message = f"the task's process ended with exit status {exit_.code} and no result"
    return Verdict(kind=Kind.CRASH, message=message, exit=exit_, evidence=evidence)


_FAULTS = {
    Fault.ERROR: Kind.ERROR,
    Fault.CRASH: Kind.CRASH,
    Fault.BAD_REQUEST: Kind.BAD_REQUEST,
    Fault.MISSING_DEPENDENCY: Kind.MISSING_DEPENDENCY,
    Fault.GPU_OOM: Kind.GPU_OOM,
    Fault.HOST_OOM: Kind.HOST_OOM,
}


def event_fields(verdict: Verdict) -> dict[str, Any]:
    """The fields of a TASK_FAILED payload that describe a verdict."""
    exit_ = verdict.exit
    return {
        "error_kind": verdict.kind.value,
        "retryable": verdict.retryable,
        "exit": None
        if exit_ is None
        else {
            "code": exit_.code,
            "signal": None if exit_.signal is None else signal_name(exit_.signal),
            "evidence": verdict.evidence,
        },
    }
