"""Objects of S3, read through the node's gateway: this process has neither credentials nor a client of S3."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import quote, unquote

import msgspec

from flowmesh.files.removal import clear
from flowmesh.messages.gateway import NO_S3, S3, S3_FAULT, S3_LIST
from flowmesh.validation.s3_url import WILD, Location, matches, parse
from runners.api import BadRequest, Context, RunnerError
from runners.data import gateway
from runners.data.cache import Entry, Meta

if TYPE_CHECKING:
    import requests


class Fetched(Protocol):
    """See `download.Fetched`."""

    @property
    def path(self) -> Path: ...
    @property
    def entry(self) -> Entry: ...
    def derived(self, name: str, make: Callable[[Path], None], /) -> Path: ...


Fetch = Callable[[Context, str, str], Fetched]
GATEWAY_STARTS_S = 10.0
TIMEOUT_S = 60.0
"""Longer than the gateway's own, so that its answer says why."""
DEFAULT_MAX_BYTES = 500 * 2**30
DEFAULT_MAX_OBJECTS = 100_000


class Passing(Exception):
    """Raised where another attempt may succeed."""


class Changed(Passing):
    """Raised where the object is not the one that was asked for by its version."""


class Missing(BadRequest):
    """Raised where there is no such object."""


class Object(NamedTuple):
    key: str
    size: int
    etag: str


def location_of(url: str, where: str) -> Location:
    """Raises BadRequest where `url` cannot be used."""
    try:
        return parse(url)
    except ValueError as error:
        raise BadRequest(f"{where}: {error}") from None


def get(
    ctx: Context, url: str, where: str, headers: Mapping[str, str], timeout_s: float = TIMEOUT_S
) -> requests.Response:
    """The gateway's answer with the status 200, 206 or 304; its body is still to be read.

    Args:
        headers: `Range` with `If-Match`, or `If-None-Match`.

    Raises:
        BadRequest: there is no such object, or the operator does not allow it.
        RunnerError: the node's credentials or region do not fit.
        Passing: S3 cannot be reached now, or the object was changed.
    """
    location = location_of(url, where)
    if location.is_folder:
        raise BadRequest(f"{where}: {url!r} is a prefix; one object is needed here, so write its whole key")
    return _asked(ctx, location, where, headers, timeout_s)


def listed(ctx: Context, location: Location, where: str) -> list[Object]:
    """The objects whose keys begin with the location's, sorted by key. Raises as `get`."""
    at_most = int(ctx.job.limits.get("unpack_max_files", DEFAULT_MAX_OBJECTS))
    for attempt in range(5):
        try:
            with _asked(ctx, location, where, {S3_LIST: str(at_most)}) as answer:
                return sorted(msgspec.json.decode(answer.content, type=list[Object]))
        except Passing as error:
            if attempt == 4:
                raise RunnerError(f"{where}: {location.url} cannot be listed: {error}") from error
            ctx.log.warning("listing interrupted url=%s reason=%s", location.url, error)
            ctx.sleep(0.5 * 2**attempt)
    raise AssertionError


def matching(ctx: Context, url: str, where: str) -> list[str]:
    """The addresses of the objects that a pattern such as `s3://data/part-*.jsonl` or a prefix ending in `/` names.

    Raises:
        BadRequest: none does.
    """
    location = location_of(url, where)
    if not location.is_folder and not WILD & set(location.key):
        return [url]
    begin = location.key
    for index, each in enumerate(begin):
        if each in WILD:
            begin = begin[:index]
            break
    pattern = f"{location.key}**" if location.is_folder else location.key
    there = listed(ctx, Location(location.bucket, begin), where)
    if any(each.key == location.key for each in there):  # the key of an object, which may have a `?` in it
        return [url]
    found = [each for each in there if matches(each.key, pattern)]
    urls = [Location(location.bucket, each.key).url for each in found if not each.key.endswith("/")]
    if not urls:
        raise BadRequest(f"{where}: no object of the bucket {location.bucket!r} matches {location.key!r}")
    return urls


def path_of(ctx: Context, url: str, where: str, fetch: Fetch) -> Path:
    """The object, or the folder of objects, that an address names; a file has the object's name.

    Args:
        fetch: `download.fetch`.

    Raises:
        BadRequest: there is neither.
    """
    location = location_of(url, where)
    seen = (str(ctx.cache_dir), ctx.task_id, ctx.job.attempt, url)
    if seen not in _found:
        if location.is_folder:
            _found[seen] = folder(ctx, url, where, fetch)
        else:
            try:
                _found[seen] = _named(fetch(ctx, url, where), location.name, where)
            except Missing as error:
                if not listed(ctx, Location(location.bucket, f"{location.key}/"), where):
                    raise BadRequest(str(error)) from None
                _found[seen] = folder(ctx, f"{url}/", where, fetch)
    return _found[seen]


_found: dict[tuple[str, str, int, str], Path] = {}
"""One version of each in a task, however often its address is looked up."""


def _named(file: Fetched, name: str, where: str) -> Path:
    def link(target: Path) -> None:
        try:
            os.link(file.path, target / name)
        except OSError as error:
            raise BadRequest(f"{where}: {name!r} cannot be the name of a file here: {error.strerror}") from None

    return file.derived("named", link) / name


def folder(ctx: Context, url: str, where: str, fetch: Fetch) -> Path:
    """The objects below a prefix as a folder of this node. Made again when one of them was changed.

    Args:
        fetch: `download.fetch`.

    Raises:
        BadRequest: there are none, too many, or two of which one would be a folder of the other.
    """
    location = location_of(url, where)
    location = Location(location.bucket, location.key.rstrip("/") + "/" if location.key else "")
    found = [each for each in listed(ctx, location, where) if not each.key.endswith("/")]
    if not found:
        raise BadRequest(f"{where}: there are no objects below {location.key!r} in the bucket {location.bucket!r}")
    bound, total = int(ctx.job.limits.get("unpack_max_bytes", DEFAULT_MAX_BYTES)), sum(each.size for each in found)
    if total > bound:
        raise BadRequest(
            f"{where}: the objects below {location.url} have {total} bytes, more than the node's setting "
            f"runners.unpack_max_bytes ({bound})"
        )
    digest = hashlib.sha256(msgspec.json.encode(found)).hexdigest()
    with Entry(ctx, location.url, {}) as entry:
        meta = entry.meta()
        if meta is None or meta.etag != digest:
            scratch = entry.folder / f"gathered-{digest[:16]}"
            _gather(ctx, scratch, location, found, where, fetch)
            clear(entry.part)
            scratch.rename(entry.part)
            meta = Meta(url=location.url, file=f"file-{digest[:16]}", size_bytes=total, etag=digest)
            clear(entry.folder / meta.file)
            entry.publish(meta)
        return entry.use(meta)


def _gather(  # noqa: PLR0917
    ctx: Context, scratch: Path, location: Location, found: list[Object], where: str, fetch: Fetch
) -> None:
    """Download each object, and link it into `scratch`: what an earlier task has gathered there stays.

    Args:
        scratch: its name has the versions of all objects.
    """
    for old in scratch.parent.glob("gathered-*"):
        if old != scratch:
            clear(old)
    for each in found:
        url = Location(location.bucket, each.key).url
        location_of(url, where)  # no `..` in it, whoever wrote it there
        target = scratch / each.key.removeprefix(location.key)
        used = Entry(ctx, url, {}).is_used
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_file():
                continue
            done = fetch(ctx, url, where)
            os.link(done.path, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise
            raise BadRequest(f"{where}: {each.key!r} cannot be a file here: {error.strerror}") from None
        if not used:
            done.entry.drop()


def _asked(
    ctx: Context, location: Location, where: str, headers: Mapping[str, str], timeout_s: float = TIMEOUT_S
) -> requests.Response:
    import requests

    node = ctx.job.gateway
    if node is None or not node.s3:
        raise BadRequest(f"{where}: {NO_S3}")
    _wait_for(ctx, Path(node.socket))
    try:
        answer = gateway.get(node, "/", {**headers, S3: quote(f"{location.bucket}/{location.key}")}, timeout_s)
    except (gateway.NotAnswered, requests.RequestException) as error:
        raise Passing("the node's gateway does not answer") from error
    fault = answer.headers.get(S3_FAULT)
    if fault is None or answer.status_code == 304:
        return answer
    answer.close()
    kind, _, text = fault.partition(":")
    text = unquote(text)
    if answer.status_code in (412, 416):
        raise Changed("the object was changed")
    if kind == "passing":
        raise Passing(text)
    if kind == "missing":
        raise Missing(f"{where}: {text}")
    if kind == "node":
        raise RunnerError(f"{where}: {text}")
    raise BadRequest(f"{where}: {text}")


def _wait_for(ctx: Context, socket: Path) -> None:
    """The gateway of a node that has just been started may not listen yet; it is asked in vain after that."""
    until = time.monotonic() + GATEWAY_STARTS_S
    while not socket.exists() and time.monotonic() < until:
        ctx.sleep(0.05)
