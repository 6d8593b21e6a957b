"""The deployment's control channel: `{"type": "CANCEL", "task_id", "force"?, "checkpoint"?, "reason"?}`.

Each message goes to every node; most nodes do not have the task.
"""

from __future__ import annotations

from loguru import logger

from flowmesh.errors import FieldError
from flowmesh.execution.executor import Executor
from flowmesh.messages.wire import decode_object, usable_task_id

CHANNEL = "flowmesh.control"
MAX_REASON = 200


def on_message(executor: Executor, data: bytes) -> None:
    """Act on a message; one that is not understood is logged and ignored."""
    try:
        message = decode_object(data)
    except FieldError as error:
        logger.warning("control message ignored: {}", error)
        return
    task_id = usable_task_id(message.get("task_id"))
    if message.get("type") != "CANCEL" or task_id is None:
        logger.warning("control message ignored: only CANCEL with a task_id is known")
        return
    reason = message.get("reason")
    executor.cancel(
        task_id,
        reason=reason[:MAX_REASON] if isinstance(reason, str) and reason else "cancelled",
        force=message.get("force") is True,
        checkpoint=message.get("checkpoint") is True,
    )
