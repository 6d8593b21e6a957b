"""Checks a dispatch message: the result is a task that can run, or an error. Its only I/O is the check of paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

from flowmesh.errors import FieldError, NotOfferedError
from flowmesh.messages.nodes import FROM_QUEUE, WHERE, read_nodes
from flowmesh.messages.output import Destination, Output, Remote, S3Destination, read_output
from flowmesh.messages.wire import MAX_TIMEOUT_S, NodeSpec, TaskMessage, decode_object
from flowmesh.processes import environ
from flowmesh.redaction import Redactor, in_document
from flowmesh.results import s3_client
from flowmesh.results.job import Target, children_of
from flowmesh.results.safe_names import check_task_id, placed
from flowmesh.settings.schema import Settings
from flowmesh.tasks import s3_fields
from flowmesh.tasks.catalogue import Catalogue, TaskType
from flowmesh.tasks.checks import check_own_fields, check_task, is_current, nodes_faults
from flowmesh.validation.checked import Checked
from flowmesh.validation.convert import convert, joined

CHECKED_BYTES = 64 * 1024
"""Longer messages are left to the child: their check would hold up the loop for milliseconds."""
MAX_MESSAGE_CHARS = 2000
"""As in a child's outcome."""


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """A message that has been decoded and checked."""

    message: TaskMessage
    type: TaskType
    spec: NodeSpec
    task: dict[str, Any]
    """The task document that the runner gets, `merge_children` included."""
    output: Output
    target: Target
    children: tuple[Target, ...]
    """The targets of merged tasks."""
    timeout_s: float | None
    """None: no time limit."""
    size_bytes: int
    """Of the message."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """The node's own about this task and its merged children."""
        return tuple(line for target in (self.target, *self.children) for line in target.warnings)

    @property
    def delivers_http(self) -> bool:
        """Whether a result of this task is sent over HTTP."""
        targets = (self.target, *self.children)
        return any(isinstance(target.destination, Remote) for target in targets)


def accept(data: bytes, *, settings: Settings, catalogue: Catalogue, results_dir: Path) -> Accepted:
    """Decode and check a dispatch for this node.

    Args:
        data: the message, JSON.
        catalogue: the task types that the node offers.
        results_dir: the folder of local results.

    Raises:
        FieldError: the task cannot run; names the field and the remedy.
    """
    raw = decode_object(data)
    message = convert(raw, TaskMessage, where="")
    check_task_id(message.task_id, "task_id")
    spec = convert(message.task.spec, NodeSpec, where="spec")
    task_type = catalogue.find(spec.taskType)
    _check_nodes(message, spec, task_type)
    _check_env(spec.env, settings)
    _check_reading(message, settings)
    orchestrator = settings.delivery.orchestrator_url
    output = read_output(spec.output, orchestrator_url=orchestrator)
    if message.rank:
        output = Output()  # the result of rank 0 is the task's: it alone is delivered
    roots = settings.results.allowed_roots
    refuse = settings.results.refuse_outside_paths
    folder, warning = placed(results_dir, roots, message.task_id, output, refuse=refuse)
    merged = [(child.task_id, child.spec) for child in message.merged_children or []]
    children = children_of(merged, output, results_dir, roots, orchestrator, refuse_outside=refuse)
    _check_s3(output.destination, message.task_id, "spec", settings)
    for index, child in enumerate(children):
        _check_s3(child.destination, child.task_id, f"merge_children[{index}].spec", settings)
    if message.task_id in {child.task_id for child in children}:
        raise FieldError(
            f"merged_children: {message.task_id!r} is also the parent's task_id; give each task a different one",
            "merged_children",
        )
    if spec.timeoutSec is not None and spec.timeoutSec > MAX_TIMEOUT_S:
        raise FieldError(f"spec.timeoutSec: at most {MAX_TIMEOUT_S:.0f} seconds (found {spec.timeoutSec})", "spec")
    return Accepted(
        message=message,
        type=task_type,
        spec=spec,
        task=_document(raw, message),
        output=output,
        target=Target(
            task_id=message.task_id,
            out_dir=str(folder),
            destination=output.destination,
            artifacts=output.artifacts,
            warnings=tuple(each for each in (warning, message.parent[1]) if each),
        ),
        children=children,
        size_bytes=len(data),
        timeout_s=spec.timeoutSec or settings.tasks.default_timeout_s,
    )


def check_fields(accepted: Accepted, settings: Settings, secrets: Redactor) -> None:
    """Check the fields that the task's runner reads, as its child would: a typo then costs no process.

    Never refuses what the child would take. Left to the child: long documents, which would hold up the loop; merged
    tasks, of which it may refuse one and run the others; types of other packages; environments with another
    interpreter, and the time after an installation: their runners may be of another version.

    Args:
        secrets: the node's.

    Raises:
        FieldError: with all that is wrong, in the words of the child.
    """
    if accepted.size_bytes > CHECKED_BYTES or accepted.children or not _has_check(accepted.type, settings):
        return
    faults = _faults(lambda: check_own_fields(accepted.task, accepted.type))
    if faults:
        raise _refusal(faults, accepted.task, secrets)


def with_all_faults(error: FieldError, data: bytes, settings: Settings, types: Mapping[str, TaskType]) -> FieldError:
    """An error of `accept`, with what else is wrong with the document.

    Args:
        types: those that the node offers.
    """
    if len(data) > CHECKED_BYTES or isinstance(error, NotOfferedError):
        return error
    here = {name: kind for name, kind in types.items() if _has_check(kind, settings)}
    found = error.faults
    others = _faults(lambda: check_task(decode_object(data)["task"], here)[0])
    own = {fault.partition(":")[0] for fault in found}
    more = [fault for fault in others if fault.partition(":")[0] not in own]
    return FieldError(joined([*found, *more]), error.path, (*found, *more)) if more else error


def _has_check(kind: TaskType, settings: Settings) -> bool:
    environment = settings.environments.get(kind.environment)
    return bool(kind.check) and (environment is None or environment.python is None) and is_current(kind)


def _faults(check: Callable[[], Checked]) -> tuple[str, ...]:
    """What a check finds; nothing where it fails, as the child then finds the cause."""
    try:
        return check().faults
    except Exception as error:  # noqa: BLE001 - a check must refuse nothing because it has a fault itself
        logger.debug("document not checked before its start: {}: {}", type(error).__name__, error)
        return ()


def _refusal(faults: tuple[str, ...], task: dict[str, Any], secrets: Redactor) -> FieldError:
    redact = Redactor([*secrets.known, *in_document(task, {})], prose=True)
    return FieldError(redact(joined(list(faults)))[:MAX_MESSAGE_CHARS], "", tuple(map(redact, faults)))


def _document(raw: dict[str, Any], message: TaskMessage) -> dict[str, Any]:
    """The submitted document with the dispatch's merged children and shard added at the fields that runners read."""
    task: dict[str, Any] = dict(raw["task"])
    if message.merged_children:
        task["merge_children"] = raw["merged_children"]
    if message.shard_total is not None and message.shard_index is not None and "shard" not in task["spec"]:
        task["spec"] = {**task["spec"], "shard": {"index": message.shard_index, "total": message.shard_total}}
    return task


def _check_nodes(message: TaskMessage, spec: NodeSpec, kind: TaskType) -> None:
    """Check that a task on several nodes comes as a member of a gang, and that its type knows how to be one."""
    if not read_nodes(spec.nodes).is_gang:
        return
    if faults := nodes_faults({"spec": message.task.spec}, kind):
        raise FieldError(faults[0], WHERE)
    if message.record is None or message.record.gang is None:
        raise FieldError(FROM_QUEUE, WHERE)
    if message.merged_children:
        raise FieldError(f"{WHERE}: merged tasks run on one node; leave it out", WHERE)


def _check_reading(message: TaskMessage, settings: Settings) -> None:
    """Check that what the task and its merged children name in S3 may be read."""
    specs = {"spec": message.task.spec}
    specs |= {f"merge_children[{at}].spec": child.spec for at, child in enumerate(message.merged_children or [])}
    for where, each in specs.items():
        if found := tuple(s3_fields.faults(each, settings.cloud.read, where)):
            raise FieldError(joined(list(found)), found[0].partition(":")[0], found)


def _check_s3(destination: Destination, task_id: str, where: str, settings: Settings) -> None:
    """Check that results may go to S3 where they should."""
    if not isinstance(destination, S3Destination) or destination.url is None:
        return
    field = f"{where}.output.destination.url"
    if not s3_fields.may_write(destination.url, task_id, settings.cloud.write):
        raise FieldError(f"{field}: {s3_fields.NOT_WRITTEN.format(url=destination.url)}", field)
    if not s3_client.is_installed():
        raise FieldError(f"{field}: {s3_client.not_installed()}", field)


def _check_env(env: dict[str, str], settings: Settings) -> None:
    for name, value in env.items():
        if not environ.matches(name, settings.tasks.allow_env) or name in environ.NEVER:
            allowed = ", ".join(settings.tasks.allow_env) or "none"
            raise FieldError(
                f"spec.env.{name}: this node does not allow a task to set it; allowed (tasks.allow_env): {allowed}",
                f"spec.env.{name}",
            )
        if "\0" in value or not name or "=" in name or "\0" in name:
            raise FieldError(
                f"spec.env.{name}: not a valid environment variable; the name must not be empty or contain '=', "
                "and name and value no NUL byte",
                f"spec.env.{name}",
            )
