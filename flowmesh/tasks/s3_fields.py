"""The fields of a document that name something of S3 to read: checked before anything is started."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from flowmesh.validation.s3_url import WILD, Location, is_allowed, is_s3, parse

_NAMES = frozenset((
    "url", "uri", "path", "identifier", "worker_path", "download_url", "jsonl_path", "dataset_name", "index", "model",
    "deepspeed", "resume_from_path",
))  # fmt: skip
"""Fields whose text names a place. Texts of others, such as prompts, may begin with s3:// without meaning one.
References of pipelines are checked once they are resolved."""


def faults(spec: dict[str, Any], read: Collection[str] | None = None) -> Iterator[str]:
    """What is wrong with the addresses in a task's spec, as `field: why`.

    Args:
        read: the node's `cloud.read`; None: not known.
    """
    inside = {name: value for name, value in spec.items() if name not in ("output", "env")}
    for where, url in _named(inside, "spec", ""):
        try:
            location = parse(url)
        except ValueError as error:
            yield f"{where}: {error}"
            continue
        begin = next((at for at, each in enumerate(location.key) if each in WILD), len(location.key))
        if read is not None and not is_allowed(read, Location(location.bucket, location.key[:begin])):
            why = "the operator does not allow documents to read it" if read else "this node reads nothing from S3"
            yield f"{where}: {url}: {why} (the node's setting cloud.read)"


def _named(value: Any, where: str, name: str) -> Iterator[tuple[str, str]]:
    open_ = [(value, where, name)]
    while open_:
        item, at, name = open_.pop()
        match item:
            case dict():
                open_ += reversed([(inner, f"{at}.{key}", str(key)) for key, inner in item.items()])
            case list():
                open_ += reversed([(inner, f"{at}[{index}]", "") for index, inner in enumerate(item)])
            case str() if name in _NAMES and is_s3(item) and "${" not in item:
                yield at, item
