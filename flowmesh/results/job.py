"""The job that the node gives to a delivery and the report that it gets back, files in the attempt's spool folder.

The node writes `delivery.json` before the delivery runs; the delivery writes `delivered.json` (atomically) at its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.errors import FieldError
from flowmesh.messages.cloud import S3Access
from flowmesh.messages.job import OUTCOME_FILE
from flowmesh.messages.output import Destination, LocalDestination, Output, Remote, file_url, read_output
from flowmesh.messages.rows import Counts
from flowmesh.messages.steps import Steps
from flowmesh.results.safe_names import check_task_id, placed
from flowmesh.settings.schema import ArchiveSettings

DELIVERY_FILE = "delivery.json"
DELIVERED_FILE = "delivered.json"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A task's folder, and where its content is sent."""

    task_id: str
    out_dir: str
    destination: Destination = LocalDestination()
    artifacts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """The node's own, for `warnings` of the result."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """The node's verdict on a task that has no result."""

    error: str
    """One line."""
    error_kind: str
    detail: str = ""
    evidence: str = ""
    log_tail: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """The runner's."""


class DeliveryJob(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt's results, and where they are sent. Does not contain the node's token."""

    attempt: int
    worker_id: str
    task: Target
    children: tuple[Target, ...] = ()
    """Merged children, each with its own folder."""
    failure: Failure | None = None
    """If set, the folders get this instead of a result, and only the rows that stand are sent."""
    document: str = ""
    """From `document_key`, where `sends_rows`: rows of another document under the same id are not shown."""
    child_documents: dict[str, str] = {}
    """The same of the merged children, by id."""
    exporter: str = ""
    """`module:function` that makes the export of a failed task's finished items; see `TaskType.exporter`."""
    exports: dict[str, dict[str, Any]] = {}
    """`spec.postprocess` of the task and of its merged children, by id, where `exporter` is set."""
    sends_rows: bool = False
    """Whether a failed task has rows; an http destination gets them."""
    extra: dict[str, Any] = {}
    """What the node adds to the result, such as `resources`. The runner's own fields win."""
    outcome_file: str = OUTCOME_FILE
    """Relative to the spool folder."""
    archive: ArchiveSettings = ArchiveSettings()
    cleanup_after_upload: bool = False
    orchestrator_url: str | None = None
    """The origin that may receive the bearer token."""
    s3: S3Access | None = None
    """How S3 is reached, and where results may go; None: nowhere."""
    bandwidth_bytes_per_sec: int | None = None
    """Limit of all deliveries that share `throttle_file`; without one, of this delivery."""
    throttle_file: str | None = None
    total_timeout_s: float = 3600.0
    """Of its attempts and the waits between them; waits for a place do not count."""
    token_expected: bool = False
    """Whether the node has a token; one that cannot be read now is waited for."""
    ends_to_wait: bool = False
    """End where another attempt is due only later; the report says when. Else the process waits for it."""
    gives_up: bool = False
    """Send nothing, and have S3 forget the parts that arrived."""
    only_local: bool = False
    """Write what belongs on the disk, and send nothing."""
    first_backoff_s: float = 0.5
    max_backoff_s: float = 30.0

    @property
    def over_http(self) -> bool:
        """Whether this needs the network, and therefore a child process."""
        targets = (self.task, *self.children)
        return (self.failure is None or self.sends_rows) and any(isinstance(t.destination, Remote) for t in targets)


class PartRows(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of a failed task, or of a child that was merged into it."""

    done: int
    total: int
    url: str | None = None
    """Where they can be downloaded."""
    out_dir: str
    """The folder that has them."""

    @property
    def resume(self) -> dict[str, str] | None:
        """The value of `spec.resume` with which another task goes on; None: there is nothing to go on from."""
        if not self.done:
            return None
        return {"path": self.out_dir} if self.url is None else {"url": self.url}


class DeliveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a delivery ended."""

    ok: bool
    error: str = ""
    """One line, with the server's answer; secrets are hidden."""
    status: int | None = None
    """The HTTP status that ended it, where one did."""
    sent_bytes: int = 0
    """Of the request bodies that were accepted, in this run."""
    seconds: float = 0.0
    urls: tuple[str, ...] = ()
    """Where the files can be downloaded."""
    notes: tuple[str, ...] = ()
    """What was done differently than configured, for example without pigz."""
    again_in_s: float | None = None
    """When the next attempt is due, of a delivery that `ends_to_wait`. `error` is why the last one failed."""
    origin: str = ""
    """Of the request that failed."""
    rows: Counts | None = None
    """Of a failed task with a row log, its merged children included."""
    parts: dict[str, PartRows] = {}
    """The same of each of them, by id."""
    steps: Steps | None = None
    """Of a failed training run."""
    attempts: int = 0
    """Failed attempts at that request so far."""


def children_of(
    merged: Iterable[tuple[str, dict[str, Any]]],
    parent: Output,
    results_dir: Path,
    allowed_roots: Iterable[str | Path] = (),
    orchestrator_url: str | None = None,
    *,
    refuse_outside: bool = False,
) -> tuple[Target, ...]:
    """The folder and destination of each merged child.

    The folder is the same as if the child had run alone. Without a destination of its own the child has the parent's.

    Args:
        merged: (task_id, spec) of each child.
        parent: the merged task's output.
        allowed_roots: `results.allowed_roots`.
        refuse_outside: `results.refuse_outside_paths`.

    Raises:
        FieldError: with the child's index in its path.
    """
    roots = tuple(allowed_roots)
    targets: list[Target] = []
    seen: set[str] = set()
    for index, (task_id, spec) in enumerate(merged):
        at = f"merge_children[{index}]"
        check_task_id(task_id, f"{at}.task_id")
        if task_id in seen:
            raise FieldError(f"{at}.task_id: {task_id!r} is listed twice; list each child once", f"{at}.task_id")
        seen.add(task_id)
        asked = spec.get("output")
        output = read_output(asked, orchestrator_url=orchestrator_url, where=f"{at}.spec.output")
        try:
            folder, warning = placed(results_dir, roots, task_id, output, refuse=refuse_outside)
        except FieldError as error:
            raise FieldError(f"{at}.{error}", f"{at}.{error.path}") from None
        own = isinstance(asked, dict) and "destination" in asked
        inherited = isinstance(parent.destination, Remote) and not own
        targets.append(
            Target(
                task_id=task_id,
                out_dir=str(folder),
                destination=parent.destination if inherited else output.destination,
                artifacts=output.artifacts,
                warnings=(warning,) if warning else (),
            )
        )
    return tuple(targets)


def file_url_template(output: Output, task_id: str) -> str | None:
    """`Job.file_url`: the URL of a delivered file, with `{name}` for its name; None without an http destination."""
    destination = output.destination
    if not isinstance(destination, Remote) or destination.url is None:
        return None
    return file_url(destination.url, task_id, "{name}")
