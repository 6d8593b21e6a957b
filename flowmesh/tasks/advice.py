"""What to do about a task that failed, by its verdict: one line for people."""

from __future__ import annotations

from flowmesh.tasks.verdicts import Kind

ADVICE: dict[Kind, str] = {
    Kind.ERROR: "Read the task's log: the task itself raised the error.",
    Kind.BAD_REQUEST: "Correct the document: `flowmesh validate FILE` names each field.",
    Kind.MISSING_DEPENDENCY: "Install what is missing on the node, or send the task to another one: `flowmesh doctor`.",
    Kind.CRASH: "Read the end of the task's log; a retry elsewhere may succeed.",
    Kind.HOST_OOM: "Give the task more memory, or less to hold at once: a smaller batch, fewer workers.",
    Kind.GPU_OOM: "Use a smaller batch, a shorter context, quantization, or a GPU with more memory.",
    Kind.GPU_FAULT: "Retry elsewhere, and look at the GPU: `flowmesh doctor` and the kernel's log.",
    Kind.HANG: "Read the stacks in the task's log, or raise tasks.hang_timeout_s.",
    Kind.TIMEOUT: "Raise spec.timeoutSec (or tasks.default_timeout_s), or split the task.",
    Kind.CANCELLED: "Nothing, if the cancel was intended.",
    Kind.DRAINED: "Retry it on another node: this one was drained.",
    Kind.DELIVERY_FAILED: "Make its destination reachable, then `flowmesh deliver TASK`: the results are kept.",
    Kind.SUPERVISOR_LOST: "Retry it, and read the node's log for why its processes ended.",
    Kind.NODE_FAULT: "Retry it on another node, and remove this one's fault: `flowmesh status`, `flowmesh doctor`.",
}


def advice(kind: str) -> str:
    """What to do about this verdict; empty where there is nothing to do or it is not known."""
    return next((text for each, text in ADVICE.items() if each.value == kind), "")
