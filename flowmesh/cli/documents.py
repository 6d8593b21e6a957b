"""Reads task documents from YAML or JSON files as plain JSON data. Errors name file, line and column.

Only the outer shape is checked here (a mapping with a `spec`); the node validates the rest.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.cli.document_parser import DocumentError, kind, parse
from flowmesh.errors import FieldError
from flowmesh.messages import wire


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A task document and the id that it is submitted under."""

    source: str
    """The file, as the user named it."""
    task_id: str
    document: dict[str, Any]
    text: str = ""
    """The file's content."""

    @property
    def task_type(self) -> str | None:
        found = self.document["spec"].get("taskType")
        return found if isinstance(found, str) else None

    def dispatch(self, worker_id: str, attempt: int | None = None) -> bytes:
        """The message that dispatches this task to a worker.

        Args:
            attempt: its number in the task's record; None: the task has none.

        Raises:
            DocumentError: it is larger than nodes accept.
        """
        message: dict[str, Any] = {
            "task_id": self.task_id,
            "task": self.document,
            "task_type": self.task_type,
            "assigned_worker": worker_id,
            "dispatched_at": wire.utc_now(),
            "parent_task_id": None,
        }
        if attempt is not None:
            message["record"] = {"attempt": attempt}
        data = json.dumps(message, ensure_ascii=False).encode()
        if len(data) > wire.MAX_MESSAGE_BYTES:
            raise DocumentError(
                f"{self.source}: the task is {len(data)} bytes as a message, and a node accepts at most "
                f"{wire.MAX_MESSAGE_BYTES}: put the data into a file or behind a URL"
            )
        return data


def load(source: str, task_id: str | None = None) -> Submission:
    """Load the task document in `source` ("-": standard input), with `task_id` or a new id.

    Raises:
        DocumentError: it cannot be read, or is neither YAML nor JSON.
        FieldError: it is not a mapping with a `spec`, or contains a value that JSON cannot represent.
    """
    name = "<stdin>" if source == "-" else source
    if source.endswith(".jsonl"):
        raise DocumentError(
            f"{name}: a task document is YAML or JSON; `flowmesh run {name} --model MODEL` runs a batch file"
        )
    text = read(source)
    document = parse(text, name, as_json=source.endswith(".json"))
    if not isinstance(document, dict):
        raise FieldError(f"{name}: expected a mapping with a field `spec`, found {kind(document)}", "")
    if not isinstance(document.get("spec"), dict):
        found = f"expected a mapping, found {kind(document['spec'])}" if "spec" in document else "missing"
        raise FieldError(f"{name}: spec: {found}; put the task's fields below it", "spec")
    check_task_id(task_id)
    return Submission(source=name, task_id=task_id or f"task-{secrets.token_hex(8)}", document=document, text=text)


def check_task_id(task_id: str | None) -> None:
    """Raises FieldError for an id that nodes do not accept."""
    if task_id is not None and wire.usable_task_id(task_id) is None:
        raise FieldError(
            f"--task-id: invalid task id {task_id!r}; allowed are up to 200 letters, digits and . _ : @ = + -",
            "task_id",
        )


def read(source: str) -> str:
    """The text of a file ("-": standard input).

    Raises:
        DocumentError: it cannot be read.
    """
    name = "<stdin>" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise DocumentError(f"{name}: cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{name}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
