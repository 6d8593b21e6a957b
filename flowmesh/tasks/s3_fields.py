"""The fields of a document that name something of S3 to read: checked before anything is started."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from flowmesh.validation.s3_url import WILD, Location, is_allowed, is_s3, parse

_NAMES = frozenset((
    "url", "uri", "path", "identifier", "worker_path", "download_url", "jsonl_path", "dataset_name", "index", "model",
    "deepspeed", "resume_from_path",
))  # fmt: skip
"""Fields whose text names a place. Texts of others, such as prompts, may begin with s3:// without meaning one.
References of pipelines are checked once they are resolved."""


_CONTENT = frozenset((
    "env", "examples", "inputs", "items", "json_schema", "messages", "metadata", "output", "preferences", "prompts",
    "rows", "_upstreamResults",
))  # fmt: skip
"""Fields that hold content, whose own fields may have any name. `output` is checked where it is read."""


def faults(spec: dict[str, Any], read: Collection[str] | None = None, where: str = "spec") -> Iterator[str]:
    """What is wrong with the addresses in a task's spec, as `field: why`.

    Args:
        read: the node's `cloud.read`; None: not known.
        where: the path of the spec.
    """
    for place, url in _named(spec, where, ""):
        try:
            location = parse(url)
        except ValueError as error:
            yield f"{place}: {error}"
            continue
        begin = next((at for at, each in enumerate(location.key) if each in WILD), len(location.key))
        if read is not None and not is_allowed(read, Location(location.bucket, location.key[:begin])):
            why = "the operator does not allow documents to read it" if read else "this node reads nothing from S3"
            yield f"{place}: {url}: {why} (the node's setting cloud.read)"


def output_faults(spec: dict[str, Any], write: Collection[str]) -> Iterator[str]:
    """The destinations in a spec, or in the stages of a pipeline, that a node would refuse, as `field: why`.

    Args:
        write: the node's `cloud.write`.
    """
    open_: list[tuple[Any, str]] = [(spec, "spec")]
    while open_:
        item, at = open_.pop()
        match item:
            case dict():
                url = item.get("url")
                if (
                    at.endswith(".destination")
                    and item.get("type") == "s3"
                    and isinstance(url, str)
                    and "${" not in url
                ):
                    yield from _refused(url, write, f"{at}.url")
                open_ += reversed([(inner, f"{at}.{key}") for key, inner in item.items()])
            case list():
                open_ += reversed([(inner, f"{at}[{index}]") for index, inner in enumerate(item)])


def _refused(url: str, write: Collection[str], where: str) -> Iterator[str]:
    with contextlib.suppress(ValueError):  # the check of the field says so
        if not may_write(url, "task", write):
            yield f"{where}: {NOT_WRITTEN.format(url=url)}"


NOT_WRITTEN = "{url}: the operator does not allow results there (the node's setting cloud.write)"


def may_write(url: str, task_id: str, write: Collection[str]) -> bool:
    """Whether a task's results may go below an address.

    Raises:
        ValueError: it is none.
    """
    return is_allowed(write, parse(url.rstrip("/")).below(task_id))


def _named(value: Any, where: str, name: str) -> Iterator[tuple[str, str]]:
    open_ = [(value, where, name)]
    while open_:
        item, at, name = open_.pop()
        match item:
            case dict():
                open_ += reversed(
                    [(inner, f"{at}.{key}", str(key)) for key, inner in item.items() if key not in _CONTENT]
                )
            case list():
                open_ += reversed([(inner, f"{at}[{index}]", "") for index, inner in enumerate(item)])
            case str() if name in _NAMES and is_s3(item) and "${" not in item:
                yield at, item
