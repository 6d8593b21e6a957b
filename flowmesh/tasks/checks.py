"""Checks task documents before they are sent or run, with the checks of the node and of the task type's runner."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flowmesh.errors import FieldError
from flowmesh.messages.nodes import WHERE, nodes_of
from flowmesh.messages.output import read_output, unused_in_output
from flowmesh.messages.wire import MAX_TIMEOUT_S, Document, MergedChild, NodeSpec
from flowmesh.tasks import s3_fields
from flowmesh.tasks.catalogue import AGENT_CHECK, TaskType
from flowmesh.validation.checked import Checked
from flowmesh.validation.convert import convert, nearest
from flowmesh.validation.unused import unused_beside_spec

_SOME_ORCHESTRATOR = "http://orchestrator.invalid"
"""Stands for the node's setting, which fills in a destination without a URL."""


def check_task(document: dict[str, Any], types: Mapping[str, TaskType]) -> tuple[Checked, str]:
    """Check a task document as far as its fields and their types go; nothing it names is opened.

    Args:
        types: the known task types; of any other one only the common fields are checked.

    Returns:
        What was found, and why the type's own fields were not checked; empty if they were.
    """
    faults = list(_node_faults(document))
    spec = document.get("spec")
    name = spec.get("taskType") if isinstance(spec, dict) else None
    if not isinstance(spec, dict) or not isinstance(name, str):
        return Checked(faults=tuple(faults)), ""
    kind = types.get(name)
    if kind is not None:
        faults += nodes_faults(document, kind)
    if kind is None:
        hint = nearest(name, list(types))
        tail = f"; {hint}" if "did you mean" in hint else ""
        return Checked(
            faults=tuple(faults)
        ), f"spec.taskType: {name!r} is not known here, its fields are not checked{tail}"
    if not kind.check:
        what = f"spec.taskType: {name!r} is another package's ({kind.runner}), its fields are not checked"
        return Checked(faults=tuple(faults)), what
    own = check_own_fields(document, kind)
    faults += [fault for fault in own.faults if fault not in faults]
    unused = (*own.unused, *unused_in_output(spec.get("output")), *unused_beside_spec(document))
    return Checked(faults=tuple(faults), unused=tuple(dict.fromkeys(unused))), ""


def nodes_faults(document: Mapping[str, Any], kind: TaskType) -> list[str]:
    """What is wrong with `spec.nodes` of a document of this type."""
    try:
        wanted = nodes_of(document)
    except FieldError as error:
        return list(error.faults)
    if wanted.is_gang and not kind.on_several_nodes:
        return [f"{WHERE}: tasks of the type {kind.name} run on one node; leave it out"]
    return []


def check_own_fields(document: dict[str, Any], kind: TaskType) -> Checked:
    """Check the fields of a task's own type, which has a check; the node's own fields are taken as checked."""
    return _load(kind.check)(document, kind.name)


def rehearse(kind: TaskType) -> None:
    """Import what the type's check needs, which its first document would wait for. May be called in any thread."""
    if kind.check and is_current(kind):
        check_own_fields({"spec": {"taskType": kind.name}}, kind)


_loaded: dict[str, tuple[int, int]] = {}
"""By module: which file it was when it was first asked for."""


def is_current(kind: TaskType) -> bool:
    """Whether a type's check is that of the program on disk, which new fork servers import. After an installation it is
    not, until the node's program is restarted."""
    name = kind.check.partition(":")[0]
    file = importlib.import_module(name).__file__
    try:
        status = os.stat(file or "")  # noqa: PTH116
    except OSError:
        return False
    found = status.st_mtime_ns, status.st_ino
    return _loaded.setdefault(name, found) == found


def check_agent_file(path: str, data: dict[str, Any]) -> Checked:
    """Check a file of the agents folder: a configuration, or the search providers."""
    return _load(AGENT_CHECK)(path, data)


def _load(name: str) -> Callable[..., Checked]:
    module, _, function = name.partition(":")
    loaded: Callable[..., Checked] = getattr(importlib.import_module(module), function)
    return loaded


def _node_faults(document: dict[str, Any]) -> Iterator[str]:
    """What the node refuses for every type, whatever its settings are."""
    try:
        spec = convert(document, Document, where="").spec
    except FieldError as error:
        yield from error.faults
        return
    yield from s3_fields.faults(spec)
    try:
        timeout_s = convert(spec, NodeSpec, where="spec").timeoutSec
        if timeout_s is not None and timeout_s > MAX_TIMEOUT_S:
            yield f"spec.timeoutSec: at most {MAX_TIMEOUT_S:.0f} seconds (found {timeout_s})"
    except FieldError as error:
        yield from error.faults
    try:
        read_output(spec.get("output"), orchestrator_url=_SOME_ORCHESTRATOR)
    except FieldError as error:
        yield from error.faults
    try:
        convert(document.get("merge_children") or [], list[MergedChild], where="merge_children")
    except FieldError as error:
        yield from error.faults
