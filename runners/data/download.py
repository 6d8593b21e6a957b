"""Downloads over http(s): streamed, resumed, checked for size, cached by URL and ETag."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from flowmesh.files.removal import clear, remove_path
from flowmesh.messages.gateway import Gateway
from flowmesh.messages.output import OF_CONNECTION, OF_PROXIES
from flowmesh.validation.s3_url import is_s3
from flowmesh.web.session import certificate_remedy
from runners.api import BadRequest, Context, Later, RunnerError
from runners.data import client, gateway, s3
from runners.data.addresses import LocalAddress
from runners.data.cache import Entry, Meta, evict, read_meta, write_meta

CHUNK_BYTES = 1 << 18
"""Upper bound of what is lost when a connection breaks."""
DEFAULT_TIMEOUT_S = 30.0
"""To connect, and for each read; not for the whole file."""
ATTEMPTS = 6
"""Consecutive attempts that each received less than PROGRESS_BYTES."""
PROGRESS_BYTES = 64 * 2**20
FIRST_PAUSE_S = 0.5
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_WHOLE = re.compile(r"bytes \*/(\d+)")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Fetched(msgspec.Struct, frozen=True):
    """A downloaded file. It does not change before this process ends."""

    path: Path
    entry: Entry

    def derived(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder derived from the file, such as an archive's contents. Made once, cached beside the file.

        Args:
            make: fills the empty folder that is passed to it.
        """
        target = self.path.with_name(f"{self.path.name}.{name}")
        with self.entry:
            if not target.is_dir():
                scratch = self.path.with_name(f"{self.path.name}.{name}.new")
                clear(scratch)
                scratch.mkdir()
                try:
                    make(scratch)
                except BaseException:
                    remove_path(scratch)
                    raise
                scratch.rename(target)
        evict(self.entry.ctx)
        return target


class _Interrupted(Exception):
    """Raised when an attempt ended early; the next one may resume."""


def fetch(
    ctx: Context,
    url: str,
    where: str,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    by_date: bool = True,
) -> Fetched:
    """The file behind `url`. A cached copy is always revalidated with the server.

    Args:
        timeout_s: to connect, and for each read.
        by_date: whether Last-Modified is enough to revalidate the cached copy if the server sends no ETag. A file that
            was rewritten within the same second, or with its old date, has the same Last-Modified.

    Raises:
        BadRequest: not an http(s) URL, or the server rejects the request (400, 401, 403, 404 …).
        RunnerError: the server cannot be reached, or the connection keeps breaking.
        Later: see `Context.downloads`.
        Cancelled: the node asked the task to stop.
    """
    check_url(url, where)
    if is_s3(url) and headers:
        raise BadRequest(f"{where}: an s3 address takes no headers; the credentials are the node's (cloud.*)")
    _check_headers(headers or {}, where)
    if not ctx.downloads:
        raise Later(f"{where}: downloaded by the task")
    entry = Entry(ctx, url, headers or {})
    with entry:
        attempt, pause_s = 1, FIRST_PAUSE_S
        while True:
            before = entry.part_bytes()
            try:
                meta = _attempt(
                    ctx,
                    entry,
                    url,
                    where,
                    headers=headers or {},
                    timeout_s=timeout_s or (s3.TIMEOUT_S if is_s3(url) else DEFAULT_TIMEOUT_S),
                    by_date=by_date,
                )
                break
            except _Interrupted as error:
                if entry.part_bytes() - before >= PROGRESS_BYTES:
                    attempt, pause_s = 0, FIRST_PAUSE_S
                if attempt == ATTEMPTS:
                    raise RunnerError(f"{where}: {_shown(url)} could not be downloaded: {error}") from error
                ctx.log.warning("download interrupted url=%s attempt=%d reason=%s", _shown(url), attempt, error)
                ctx.sleep(pause_s)
                attempt, pause_s = attempt + 1, pause_s * 2
        path = entry.use(meta)
    evict(ctx)
    return Fetched(path, entry)


def check_url(url: str, where: str) -> None:
    """Raises BadRequest where `url` is not http(s) with a host, and no object of S3."""
    if is_s3(url):
        s3.location_of(url, where)
        return
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError as error:  # an invalid port or IPv6 address
        raise BadRequest(f"{where}: {url.split('?', maxsplit=1)[0]!r} is not a URL: {error}") from None
    if not sound:
        raise BadRequest(f"{where}: {_shown(url)!r} is not an http or https URL")


def _check_headers(headers: Mapping[str, str], where: str) -> None:
    """Raises BadRequest for headers that cannot be sent. Values may be secret, so errors give only the name."""
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise BadRequest(f"{where}: the header {name!r} cannot be sent: only plain letters, and no line breaks")
        if name.lower() in OF_CONNECTION or name.lower().startswith(OF_PROXIES):
            raise BadRequest(f"{where}: the header {name!r} belongs to the connection, and the node sets it; remove it")


def _attempt(
    ctx: Context,
    entry: Entry,
    url: str,
    where: str,
    *,
    headers: Mapping[str, str],
    timeout_s: float,
    by_date: bool,
) -> Meta:
    import requests

    cached, partial = entry.meta(), read_meta(entry.part_meta)
    have = entry.part_bytes()
    if is_s3(url):
        return _attempt_s3(ctx, entry, url, where, timeout_s, cached, partial)
    asked = {"Accept-Encoding": "identity"}  # lengths and ranges count the file's own bytes
    if have and partial is not None and (version := partial.etag or (by_date and partial.last_modified)):
        asked |= {"Range": f"bytes={have}-", "If-Range": version}
    elif cached is not None:
        if cached.etag:
            asked["If-None-Match"] = cached.etag
        elif cached.last_modified and by_date:
            asked["If-Modified-Since"] = cached.last_modified
    try:
        found = client.get(ctx.job.permits, url, own=asked, custom=headers, timeout_s=timeout_s, node=_with_token(ctx))
        with found.response as answer:
            if answer.status_code == 304 and cached is not None:
                return cached
            if answer.status_code == 416 and partial is not None and "Range" in asked:
                return _nothing_left(entry, answer, partial, have)
            _check_status(found, url, where)
            return _receive(ctx, entry, answer, url, have if answer.status_code == 206 else 0)
    except LocalAddress as error:
        raise BadRequest(f"{where}: {error}") from error
    except (client.BadRedirect, requests.exceptions.InvalidURL) as error:
        raise BadRequest(f"{where}: {_shown(url)}: {error}") from error
    except gateway.NotAnswered as error:
        if certificate_remedy() in str(error):
            raise RunnerError(f"{where}: {_shown(url)}: {error}") from error
        raise _Interrupted(str(error)) from error
    except requests.RequestException as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):  # the next attempt would find the same certificate
            raise RunnerError(
                f"{where}: {_shown(url)}: its certificate is not trusted; {certificate_remedy()}"
            ) from error
        raise _Interrupted(_reason(error)) from error


def _with_token(ctx: Context) -> Gateway | None:
    """The gateway, where it fetches from the orchestrator."""
    found = ctx.job.gateway
    return found if found is not None and found.token else None


def _attempt_s3(  # noqa: PLR0917
    ctx: Context, entry: Entry, url: str, where: str, timeout_s: float, cached: Meta | None, partial: Meta | None
) -> Meta:
    import requests

    have = entry.part_bytes()
    asked = {}
    if have and partial is not None and partial.etag:
        asked = {"Range": f"bytes={have}-", "If-Match": partial.etag}
    elif cached is not None and cached.etag:
        asked = {"If-None-Match": cached.etag}
    try:
        with s3.get(ctx, url, where, asked, timeout_s) as answer:
            if answer.status_code == 304 and cached is not None:
                return cached
            return _receive(ctx, entry, answer, url, have if answer.status_code == 206 else 0)
    except s3.Changed as error:
        entry.part.unlink(missing_ok=True)
        raise _Interrupted(str(error)) from error
    except s3.Passing as error:
        raise _Interrupted(str(error)) from error
    except requests.RequestException as error:
        raise _Interrupted(_reason(error)) from error


def _nothing_left(entry: Entry, answer: Any, partial: Meta, have: int) -> Meta:
    """The partial download is complete: an earlier task ended after its last byte and before it was published."""
    match = _WHOLE.fullmatch(answer.headers.get("Content-Range", ""))
    if match is not None and int(match[1]) == have and answer.headers.get("ETag", partial.etag) == partial.etag:
        return _publish(entry, partial, have)
    entry.part.unlink(missing_ok=True)
    raise _Interrupted("the partial download is longer than the file")


def _check_status(found: client.Answered, url: str, where: str) -> None:
    answer = found.response
    status = answer.status_code
    if status in (200, 206):
        return
    said = f"{status} {answer.reason}"
    if status == 401 and found.with_token:
        raise _Interrupted(f"the server answered {said}: it refuses the node's token")
    if status in (401, 403) and found.hint:
        raise BadRequest(f"{where}: the server answered {said} for {_shown(url)}; {found.hint}")
    if status in RETRIED:
        raise _Interrupted(f"the server answered {said}")
    if 400 <= status < 500:
        raise BadRequest(f"{where}: the server answered {said} for {_shown(url)}")
    raise RunnerError(f"{where}: the server answered {said} for {_shown(url)}")


def _receive(ctx: Context, entry: Entry, answer: Any, url: str, start: int) -> Meta:
    """Append the response body to the partial download, check the size, publish the file."""
    total = _total_bytes(answer, start)
    etag = answer.headers.get("ETag")
    meta = Meta(
        url=_shown(url),
        file="",
        size_bytes=total or 0,
        etag=etag if etag and not etag.startswith("W/") else None,  # a weak ETag does not guarantee identical bytes
        last_modified=answer.headers.get("Last-Modified"),
    )
    evict(ctx, coming_bytes=(total or start) - start)
    done = start
    with entry.part.open("r+b" if start else "wb") as part:
        if start:
            part.seek(start)
            part.truncate()
        # Only after truncation: part.json must never describe bytes of an older version. A body with a content
        # encoding cannot be resumed.
        write_meta(
            entry.part_meta, msgspec.structs.replace(meta, etag=None, last_modified=None) if _packed(answer) else meta
        )
        try:
            for chunk in answer.iter_content(CHUNK_BYTES):
                part.write(chunk)
                done += len(chunk)
                ctx.progress(done, total, "bytes")
            part.flush()
        except OSError as error:
            if error.errno in _FULL:
                entry.part.unlink()  # a retry would not fit either, and others need the space
            raise
    if total is not None and done != total:
        raise _Interrupted(f"received {done} of {total} bytes")
    return _publish(entry, meta, done)


def _publish(entry: Entry, meta: Meta, size_bytes: int) -> Meta:
    number = sum(each.name.startswith("file-") for each in entry.folder.iterdir())
    while (entry.folder / f"file-{number}").exists():
        number += 1
    meta = msgspec.structs.replace(meta, file=f"file-{number}", size_bytes=size_bytes)
    entry.publish(meta)
    return meta


def _packed(answer: Any) -> bool:
    """Whether the body has a content encoding although none was accepted; Content-Length is not the file size then."""
    return bool(answer.headers.get("Content-Encoding", "identity") != "identity")


def _total_bytes(answer: Any, start: int) -> int | None:
    if answer.status_code == 206:
        match = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise _Interrupted(f"asked for bytes from {start}, got {answer.headers.get('Content-Range')!r}")
        return None if match[2] == "*" else int(match[2])
    if _packed(answer):
        return None
    length = answer.headers.get("Content-Length")
    return int(length) if length is not None and length.isdigit() else None


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.exceptions.Timeout):
        return "the server stopped responding"
    if isinstance(error, requests.exceptions.SSLError):
        return f"TLS: {error}; {certificate_remedy()}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "no connection to the server"
    return str(error)


def _shown(url: str) -> str:
    """`url` without user, password and query, which may be secret."""
    if is_s3(url):
        return url
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path}" if parts.scheme else url.split("?", maxsplit=1)[0]
