"""Whether `flowmesh run` hands its documents to the node that runs on this machine already, and why not."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from flowmesh.cli import locate
from flowmesh.cli.control import Control, NotPermitted
from flowmesh.cli.documents import Submission
from flowmesh.cli.local import LocalOptions
from flowmesh.cli.running_node import RunningNode
from flowmesh.errors import ConfigError, UnavailableError
from flowmesh.settings import paths
from flowmesh.validation.s3_url import is_s3

_PATHS = frozenset(
    ("path", "url", "uri", "download_url", "worker_path", "jsonl_path", "jsonl", "identifier", "dataset_name",
     "resume_from_path", "deepspeed", "index", "documents", "file", "script", "inputs")
)  # fmt: skip
"""Fields whose texts may be paths of files that a task reads."""
_LOCAL_HOSTS = frozenset(("localhost", "127.0.0.1", "::1", "0.0.0.0"))


class Choice(msgspec.Struct, frozen=True):
    """Where documents run."""

    node: RunningNode | None
    why: str
    """Why not on the node that runs here, or that they do; empty: no node runs here."""
    results_dir: Path | None = None
    """The node's."""


def choose(options: LocalOptions, submissions: Sequence[Submission]) -> Choice:
    """Choose the node on this machine if it does with these documents what a temporary node would do."""
    try:
        settings = locate.settings(options.config)
        folder = paths.state_dir(settings, os.environ)
        with Control(folder) as control:
            status = control.status_json()
    except NotPermitted:
        return Choice(None, "the node on this machine is another user's: starting a temporary one")
    except (UnavailableError, ConfigError):
        return Choice(None, "")
    results = status.get("results_dir")
    if why := objection(status, options, submissions):
        return Choice(None, f"not on the node that runs here: {why}")
    assert isinstance(results, str)
    return Choice(
        RunningNode(folder, settings.processes.task_user),
        f"on the node that runs here ({folder}); --embedded starts a temporary one",
        Path(results),
    )


def objection(status: Mapping[str, Any], options: LocalOptions, submissions: Sequence[Submission]) -> str:
    """Why a node would not do with these documents what a temporary one does; empty: it would.

    Args:
        status: the node's.
    """
    if status.get("draining"):
        return "it drains"
    results = status.get("results_dir")
    if not isinstance(results, str):
        return "it is of an older version"
    if options.results_dir is not None and Path(options.results_dir).absolute() != Path(results):
        return f"its results go to {results}"
    permits = status.get("permits") or {}
    offered = status.get("task_types") or []
    roots = [*(permits.get("read_roots") or []), results]
    for each in submissions:
        for task_type in task_types(each.document):
            if task_type not in offered:
                return f"it does not offer {task_type}"
        for path in named_files(each.document):
            if not any(_is_below(path, root) for root in roots):
                return f"its tasks may not read {path} (tasks.read_roots)"
        if any(_values(each.document, "trust_remote_code")) and not permits.get("trust_remote_code"):
            return "it does not run code of models (tasks.trust_remote_code)"
        hosts = {urlsplit(text).hostname for text in _texts(each.document) if text.startswith(("http://", "https://"))}
        if hosts & _LOCAL_HOSTS and not permits.get("local_hosts"):
            return "its tasks may not reach this machine (tasks.local_hosts)"
        if any(map(is_s3, _texts(each.document))) and not permits.get("s3_read"):
            return "its tasks may not read from S3 (cloud.read)"
    return ""


def task_types(document: Mapping[str, Any]) -> Iterator[str]:
    """The task types that a document names, its stages' included."""
    for found in _values(document, "taskType"):
        if isinstance(found, str) and "${" not in found:
            yield found


def absolute(document: dict[str, Any]) -> dict[str, Any]:
    """A document in which the files that it names have full paths: the node's own folder is another one."""
    made: dict[str, Any] = _absolute(document, "")
    return made


def named_files(document: Mapping[str, Any]) -> list[Path]:
    """The files and folders that a document names and that are there."""
    return [
        path
        for name, text in _named_texts({key: value for key, value in document.items() if key != "metadata"}, "")
        if name in _PATHS and (path := _existing(text)) is not None
    ]


def _absolute(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: item if key == "output" else _absolute(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_absolute(item, name) for item in value]
    if isinstance(value, str) and name in _PATHS and (path := _existing(value)) is not None:
        return str(path)
    return value


def _existing(text: str) -> Path | None:
    if not text or "://" in text or "\n" in text or text.startswith("builtin:") or len(text) > 4096:
        return None
    try:
        path = Path(text).expanduser().absolute()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _is_below(path: Path, root: str) -> bool:
    """Whether a path, with its links followed, is in a root; `*` stands for one part."""
    real = path.resolve()
    return any(fnmatch.fnmatchcase(str(part), root) for part in (real, *real.parents)) or real.is_relative_to(
        Path(root).resolve()
    )


def _named_texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key != "output":
                yield from _named_texts(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _named_texts(item, name)
    elif isinstance(value, str):
        yield name, value


def _texts(value: Any) -> Iterator[str]:
    return (text for _, text in _named_texts(value, ""))


def _values(value: Any, name: str) -> Iterator[Any]:
    """The values of all fields of one name."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == name:
                yield item
            yield from _values(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _values(item, name)
