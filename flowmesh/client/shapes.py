"""What clients check of documents and ids before they send them. Nodes check the rest."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from flowmesh.errors import FieldError
from flowmesh.messages import wire


def checked(task_id: str) -> str:
    """`task_id`.

    Raises:
        FieldError: it is no valid id.
    """
    if wire.usable_task_id(task_id) is None:
        raise FieldError(
            f"invalid task id {task_id!r}; allowed are up to 200 letters, digits and . _ : @ = + -", "task_id"
        )
    return task_id


def shaped(document: Mapping[str, Any]) -> None:
    """Check a document's outer shape; the node checks the rest.

    Raises:
        FieldError: it is not a mapping with a `spec`.
    """
    if not isinstance(document, Mapping):
        raise FieldError(f"the document: expected a mapping, found {type(document).__name__}", "")
    if not isinstance(document.get("spec"), Mapping):
        raise FieldError("spec: missing, or not a mapping; put the task's fields below it", "spec")


def id_or_new(task_id: str | None) -> str:
    """`task_id`, or a new one where it is None."""
    return checked(task_id) if task_id is not None else f"task-{secrets.token_hex(8)}"


def name_of(document: Mapping[str, Any]) -> str:
    """`metadata.name`, cut to 200 characters."""
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    return str(name)[:200] if isinstance(name, str | int) else ""


def time_limit_of(document: Mapping[str, Any]) -> str:
    """`spec.timeoutSec` as text; empty: there is none that a node could read."""
    spec = document.get("spec")
    limit = spec.get("timeoutSec") if isinstance(spec, Mapping) else None
    return repr(limit) if isinstance(limit, int | float) and not isinstance(limit, bool) and limit > 0 else ""


def encoded(document: Mapping[str, Any]) -> bytes:
    """A document or a message as JSON.

    Raises:
        FieldError: JSON cannot represent it, or it is too large.
    """
    try:
        data = json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise FieldError(f"the document cannot be written as JSON: {error}", "") from None
    if len(data) > wire.MAX_MESSAGE_BYTES:
        raise FieldError(
            f"the task is {len(data)} bytes as a message, and a node accepts at most {wire.MAX_MESSAGE_BYTES}: "
            "put the data into a file or behind a URL",
            "",
        )
    return data
