"""A batch file of OpenAI's API as a task, for `flowmesh run batch.jsonl --model MODEL`."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from flowmesh.cli.document_parser import DocumentError
from flowmesh.cli.documents import Submission, check_task_id

SUFFIX = ".jsonl"
FIELDS = ("custom_id", "method", "url", "body")
_MAX_FIRST_LINE = 64 << 20


def is_batch_file(source: str) -> bool:
    """Whether a file of `flowmesh run` is a batch file, by its name."""
    return source.endswith(SUFFIX)


def submission_of(
    source: str, model: str, *, engine: str | None = None, served: tuple[str, ...] = (), task_id: str | None = None
) -> Submission:
    """The task that answers the lines of a batch file.

    Args:
        model: a hub id or a local folder.
        served: names that the lines may give the model, besides its own.
        task_id: None: a new one.

    Raises:
        DocumentError: the file cannot be read, or is no batch file.
        FieldError: invalid `task_id`.
    """
    path = Path(source).absolute()
    check_first_line(source, path)
    check_task_id(task_id)
    names = [*served]
    if Path(model).is_dir():
        names.append(model)  # as the lines may write it
        model = str(Path(model).absolute())
    data: dict[str, Any] = {"type": "openai_batch", "path": str(path)}
    if names:
        data["served_model_name"] = names
    spec = {"taskType": "inference", "model": {"source": {"identifier": model}}, "data": data}
    if engine is not None:
        spec["engine"] = engine
    document = {"apiVersion": "flowmesh/v1", "kind": "Task", "metadata": {"name": path.stem}, "spec": spec}
    text = json.dumps(document, indent=1)
    return Submission(source=source, task_id=task_id or f"task-{secrets.token_hex(8)}", document=document, text=text)


def check_first_line(source: str, path: Path) -> None:
    """Raises DocumentError for a file whose first line is no request; the task checks the others."""
    try:
        with path.open("rb") as file:
            line = b""
            while not line.strip():
                line = file.readline(_MAX_FIRST_LINE)
                if not line:
                    raise DocumentError(f"{source}: holds no line; a batch file has one request a line")
    except OSError as error:
        raise DocumentError(f"{source}: cannot be read: {error.strerror}") from None
    try:
        first = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        first = None
    if not isinstance(first, dict) or not set(FIELDS) & set(first):
        raise DocumentError(
            f"{source}: not a batch file: each of its lines has to be an object with {', '.join(FIELDS)}, as for "
            "OpenAI's Batch API; for rows with prompts write a task with data.type jsonl"
        )
