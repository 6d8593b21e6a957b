"""`data.type: jsonl | csv | parquet`: rows of a file on this node or behind a URL, or of files that a pattern names."""

from __future__ import annotations

import os
from typing import Annotated, Any, Protocol
from urllib.parse import urlsplit

from msgspec import Meta

from flowmesh.validation.s3_url import is_s3, is_url
from runners.api import BadRequest, Context
from runners.data import s3
from runners.data.download import fetch
from runners.data.local import Part, Table, matching
from runners.data.order import Rows, items_of
from runners.data.prompts import Items
from runners.data.readers import File, format_of
from runners.data.shard import Shard
from runners.models.sources import local_path


class Located(Protocol):
    """What names the files of a source."""

    @property
    def type(self) -> str: ...
    @property
    def path(self) -> str | None: ...
    @property
    def url(self) -> str | None: ...
    @property
    def headers(self) -> dict[str, str] | None: ...
    @property
    def timeout_s(self) -> float | None: ...


class FileData(Rows, frozen=True, kw_only=True, rename={"timeout_s": "timeoutSec"}):
    """spec.data of type jsonl, csv or parquet"""

    type: str
    path: str | None = None
    url: str | None = None
    headers: dict[str, str] | None = None
    timeout_s: Annotated[float, Meta(gt=0)] | None = None


def load_file(ctx: Context, section: dict[str, Any], shard: Shard | None, spec: dict[str, Any], where: str) -> Items:  # noqa: ARG001
    """See `sources.load_items`."""
    data = ctx.check(section, FileData, where)
    return items_of(ctx, Table([Part(tuple(files_of(ctx, data, where)))]), data, shard, where)


def files_of(ctx: Context, data: Located, where: str) -> list[File]:
    """The files that `path` or `url` names, downloaded where it is a URL.

    Raises:
        BadRequest: naming the field.
        RunnerError: the server cannot be reached.
    """
    if (data.path is None) == (data.url is None):
        raise BadRequest(f"{where}: give either `path` or `url`")
    by_url = data.path is not None and is_url(data.path)  # a stage's jsonl_export.path
    url = data.path if by_url else data.url
    if url is not None and is_s3(url):
        return _of_s3(ctx, data, url, f"{where}.path" if by_url else f"{where}.url", where)
    if url is not None:
        field = f"{where}.path" if by_url else f"{where}.url"
        fetched = fetch(ctx, url, field, headers=data.headers, timeout_s=data.timeout_s, by_date=False)
        return [File(path=fetched.path, format=_format(data.type, urlsplit(url).path), where=field)]
    for name, value in (("headers", data.headers), ("timeoutSec", data.timeout_s)):
        if value is not None:
            raise BadRequest(f"{where}.{name}: goes with `url`; a file of this node needs none")
    field, shown = f"{where}.path", data.path or ""
    path = local_path(ctx, shown, field)
    several = matching(ctx, shown, field)
    for file in several or [path]:
        if not file.is_file():
            raise BadRequest(f"{field}: there is no file {shown!r} on this node")
        if not os.access(file, os.R_OK):
            raise BadRequest(f"{field}: {shown!r} cannot be read by the node's user")
    names = [f"{field} {each.name}" for each in several] or [field]
    return [
        File(path=each, format=_format(data.type, each.name), where=name, reach=ctx.reach)
        for each, name in zip(several or [path], names, strict=True)
    ]


def _of_s3(ctx: Context, data: Located, url: str, field: str, where: str) -> list[File]:
    """One object, those that match a pattern, or those below a prefix."""
    if data.headers is not None:
        raise BadRequest(f"{where}.headers: an s3 address takes none; the credentials are the node's (cloud.*)")
    urls = s3.matching(ctx, url, field)
    files = [local_path(ctx, each, field) for each in urls]
    names = [field] if urls == [url] else [f"{field} {each.name}" for each in files]
    return [
        File(path=each, format=_format(data.type, each.name), where=name)
        for each, name in zip(files, names, strict=True)
    ]


def _format(kind: str, name: str) -> str:
    """The task says the format; a file called .tsv has tabs between its cells all the same."""
    return "tsv" if kind == "csv" and format_of(name) == "tsv" else kind
