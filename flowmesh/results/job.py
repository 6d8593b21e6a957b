"""What a delivery is told and what it answers; both are files in the attempt's spool folder.

`delivery.json` is written by the node before the delivery runs, `delivered.json` (atomically) by the delivery when it
is over. `delivery_state.json` is the delivery's own: what it need not do again after it was killed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.errors import FieldError
from flowmesh.messages.job import OUTCOME_FILE
from flowmesh.messages.output import HttpDestination, LocalDestination, Output, file_url, read_output
from flowmesh.results.names import check_task_id, task_folder
from flowmesh.settings_schema import ArchiveSettings

DELIVERY_FILE = "delivery.json"
DELIVERED_FILE = "delivered.json"
STATE_FILE = "delivery_state.json"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A task's folder and where its content goes."""

    task_id: str
    out_dir: str
    destination: LocalDestination | HttpDestination = LocalDestination()
    artifacts: tuple[str, ...] = ()


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """The node's verdict on a task that has no result."""

    error: str
    """One line."""
    error_kind: str
    detail: str = ""
    evidence: str = ""
    log_tail: tuple[str, ...] = ()


class DeliveryJob(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt's results and where they go. Holds no token of the node's."""

    attempt: int
    worker_id: str
    task: Target
    children: tuple[Target, ...] = ()
    """Merged children, each with its own folder."""
    failure: Failure | None = None
    """Set: nothing is sent, and the folders get this instead of a result."""
    extra: dict[str, Any] = {}
    """What the node adds to the result, such as `resources`. Never replaces what the runner said."""
    outcome_file: str = OUTCOME_FILE
    """Relative to the spool folder."""
    archive: ArchiveSettings = ArchiveSettings()
    cleanup_after_upload: bool = False
    orchestrator_url: str | None = None
    """The address that may have the bearer token."""
    bandwidth_bytes_per_sec: int | None = None
    """Of all deliveries of the node together, where they share `throttle_file`; else of this one."""
    throttle_file: str | None = None
    total_timeout_s: float = 3600.0
    first_backoff_s: float = 0.5
    max_backoff_s: float = 30.0

    @property
    def over_http(self) -> bool:
        """Whether this needs the network, and so a process of its own."""
        targets = (self.task, *self.children)
        return self.failure is None and any(isinstance(t.destination, HttpDestination) for t in targets)


class DeliveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a delivery ended."""

    ok: bool
    error: str = ""
    """One line, with the server's answer; secrets are hidden."""
    status: int | None = None
    """The HTTP status that ended it, where one did."""
    sent_bytes: int = 0
    """Bodies of requests that were accepted, in this run."""
    seconds: float = 0.0
    urls: tuple[str, ...] = ()
    """Where the files can be fetched."""
    notes: tuple[str, ...] = ()
    """What was done differently than asked, such as without pigz."""


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """One file that arrived."""

    size: int
    mtime_ns: int


class State(msgspec.Struct, kw_only=True):
    """What is done already."""

    attempt: int
    archives: dict[str, tuple[int, str]] = {}
    """By path: size and checksum."""
    sent: dict[str, Sent] = {}
    """By address."""
    results: list[str] = []
    """Ids of the tasks whose result arrived."""


def children_of(
    merged: Iterable[tuple[str, dict[str, Any]]],
    parent: Output,
    results_dir: Path,
    allowed_roots: Iterable[str | Path] = (),
    orchestrator_url: str | None = None,
) -> tuple[Target, ...]:
    """Where each merged child's part goes.

    Its folder is its own, as if it had run alone. It is sent to its own destination, or where it names none, to the
    parent's.

    Args:
        merged: (task_id, spec) of each child.

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
            raise FieldError(f"{at}.task_id: {task_id!r} is there twice", f"{at}.task_id")
        seen.add(task_id)
        asked = spec.get("output")
        output = read_output(asked, orchestrator_url=orchestrator_url, where=f"{at}.spec.output")
        try:
            folder = task_folder(results_dir, roots, task_id, output)
        except FieldError as error:
            raise FieldError(f"{at}.{error}", f"{at}.{error.path}") from None
        own = isinstance(asked, dict) and "destination" in asked
        inherited = isinstance(parent.destination, HttpDestination) and not own
        targets.append(
            Target(
                task_id=task_id,
                out_dir=str(folder),
                destination=parent.destination if inherited else output.destination,
                artifacts=output.artifacts,
            )
        )
    return tuple(targets)


def file_url_template(output: Output, task_id: str) -> str | None:
    """`Job.file_url`: where a delivered file will be found, `{name}` standing for its name; None without HTTP."""
    destination = output.destination
    if not isinstance(destination, HttpDestination) or destination.url is None:
        return None
    return file_url(destination.url, task_id, "{name}")
