"""`spec.output`: where a task's results are delivered.

`read_output` is the only entry point. What it returns is complete and checked: the URL is filled in, and every name
and header can be used.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit

import msgspec

from flowmesh.errors import FieldError
from flowmesh.validation.convert import convert, nearest
from flowmesh.validation.s3_url import is_s3, parse

DEFAULT_TIMEOUT_S = 15.0
MAX_TIMEOUT_S = 24 * 3600.0
METHODS = ("POST", "PUT", "PATCH")
RESULTS_PATH = "/api/v1/results"

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # a header's name, RFC 9110 5.6.2
OF_CONNECTION = frozenset((
    "connection", "content-length", "expect", "host", "http2-settings", "keep-alive", "te", "trailer",
    "transfer-encoding", "upgrade",
))  # fmt: skip
"""Headers of one connection, in lower case. `host` would choose another site of the server than the URL says."""
OF_PROXIES = "proxy-"
_IN_SEGMENT = "@:=+"  # characters of a task id that need no escape in a URL's path


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class LocalDestination(_Strict, frozen=True, tag_field="type", tag="local"):
    """Results stay on the node's disk."""

    path: str | None = None
    """The parent of the task's folder; see docs/contract.md, 3."""


class Remote(_Strict, frozen=True):
    """Results are sent, and stay on the node's disk too."""

    url: str | None = None
    """Never None in what `read_output` returns."""
    timeout_s: float = msgspec.field(name="timeoutSec", default=DEFAULT_TIMEOUT_S)
    """Of one attempt: to connect, and for each wait for data from the server."""


class HttpDestination(Remote, frozen=True, tag_field="type", tag="http"):
    """Results are sent over HTTP."""

    method: str = "POST"
    headers: dict[str, str] = {}


class S3Destination(Remote, frozen=True, tag_field="type", tag="s3"):
    """Results become objects below `url`, s3://BUCKET/PREFIX."""


Destination = LocalDestination | HttpDestination | S3Destination


class Output(_Strict, frozen=True):
    """`spec.output`."""

    destination: Destination = LocalDestination()
    artifacts: tuple[str, ...] = ()
    """Paths below the task's folder: files are uploaded, folders archived and uploaded."""


def read_output(value: Any, *, orchestrator_url: str | None = None, where: str = "spec.output") -> Output:
    """`spec.output`, checked and completed.

    Args:
        value: the field as decoded from JSON; None: the task has none.
        orchestrator_url: for an http destination without `url`.
        where: the path of the field, for errors.

    Raises:
        FieldError: names the field, what was found and what is allowed. Never contains a header's value or a password.
    """
    if value is None:
        return Output()
    output = convert(value, Output, where=where, unused=[])
    _check_artifacts(output, f"{where}.artifacts")
    destination = output.destination
    if isinstance(destination, LocalDestination):
        return output
    if isinstance(destination, S3Destination):
        return msgspec.structs.replace(output, destination=_settled_s3(destination, f"{where}.destination"))
    return msgspec.structs.replace(output, destination=_settled(destination, orchestrator_url, f"{where}.destination"))


def unused_in_output(value: Any, where: str = "spec.output") -> list[str]:
    """Paths of the fields of `spec.output` that `read_output` accepts without effect."""
    unused: list[str] = []
    if value is not None:
        with contextlib.suppress(FieldError):  # the node has refused the task
            convert(value, Output, where=where, unused=unused)
    return unused


def file_url(url: str, task_id: str, name: str | None = None) -> str:
    """The URL that files of a task are POSTed to, or that one is downloaded from (docs/contract.md, 2).

    A download URL has no user, password or query: it becomes part of results, which others read.

    Args:
        url: the destination's.
        name: the file to download; `{name}` makes a template; None: the URL to POST to.
    """
    if is_s3(url):
        folder = f"{url.rstrip('/')}/{task_id}"
        return folder if name is None else f"{folder}/{name}"
    parts = urlsplit(url)
    path = f"{parts.path.rstrip('/')}/{quote(task_id, safe=_IN_SEGMENT)}/files"
    if name is None:
        return urlunsplit(parts._replace(path=path, fragment=""))
    tail = name if name == "{name}" else quote(name, safe="")
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(SplitResult(parts.scheme, host, f"{path}/{tail}", "", ""))


def result_object(url: str, task_id: str) -> str:
    """The address of the object that gets a task's result, below an S3 destination."""
    return f"{file_url(url, task_id)}.json"


def check_url(url: str, where: str) -> None:
    """Check that `url` is an http(s) URL.

    Raises:
        FieldError: it is not. Shows at most its scheme: the rest may contain secrets.
    """
    if any(ord(c) <= 0x20 or ord(c) == 0x7F for c in url):
        raise FieldError(f"{where}: not a URL: it contains a space or a control character", where)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # its text may contain a password
        raise FieldError(f"{where}: not a URL: its host or port cannot be parsed", where) from None
    if parts.scheme not in {"http", "https"}:
        found = f"found {parts.scheme!r}" if parts.scheme else "found none"
        hint = "; an s3 address needs `type: s3`" if parts.scheme == "s3" else ""
        raise FieldError(f"{where}: the scheme must be http or https ({found}){hint}", where)
    if not host:
        raise FieldError(f"{where}: the URL has no host; write http://HOST[:PORT]/PATH", where)


def _settled(destination: HttpDestination, orchestrator_url: str | None, where: str) -> HttpDestination:
    url = destination.url
    if url is None:
        if not orchestrator_url:
            raise FieldError(
                f"{where}.url: missing; give one, as this node has no ORCHESTRATOR_BASE_URL",
                f"{where}.url",
            )
        url = orchestrator_url.rstrip("/") + RESULTS_PATH
    check_url(url, f"{where}.url")
    method = destination.method.upper()
    if method not in METHODS:
        raise FieldError(
            f"{where}.method: {destination.method!r} cannot carry a result; {nearest(method, list(METHODS))}",
            f"{where}.method",
        )
    _check_timeout(destination, where)
    check_headers(destination.headers, f"{where}.headers")
    return msgspec.structs.replace(destination, url=url, method=method)


def _settled_s3(destination: S3Destination, where: str) -> S3Destination:
    if destination.url is None:
        raise FieldError(f"{where}.url: missing; write s3://BUCKET/PREFIX", f"{where}.url")
    url = destination.url.rstrip("/")
    try:
        if not is_s3(url):
            raise ValueError("the type s3 needs an address such as s3://BUCKET/PREFIX")
        parse(url)
    except ValueError as error:
        raise FieldError(f"{where}.url: {error}", f"{where}.url") from None
    _check_timeout(destination, where)
    return msgspec.structs.replace(destination, url=url)


def _check_timeout(destination: Remote, where: str) -> None:
    if not 0 < destination.timeout_s <= MAX_TIMEOUT_S:
        raise FieldError(
            f"{where}.timeoutSec: must be more than 0 and at most {MAX_TIMEOUT_S:.0f} seconds "
            f"(found {destination.timeout_s})",
            f"{where}.timeoutSec",
        )


def check_headers(headers: dict[str, str], where: str) -> None:
    """Raises FieldError for headers that cannot be sent, or are the connection's. Shows no value."""
    seen: set[str] = set()
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name):
            shown = name.partition(":")[0][:80]  # after a colon comes a value, which may be a secret
            raise FieldError(f"{where}: {shown!r} is not a valid header name", where)
        path, lower = f"{where}.{name}", name.lower()
        if lower in OF_CONNECTION or lower.startswith(OF_PROXIES):
            raise FieldError(f"{path}: this header belongs to the connection, and the node sets it; remove it", path)
        if lower in seen:
            raise FieldError(f"{path}: given twice; header names ignore case", path)
        seen.add(lower)
        if "\r" in value or "\n" in value:
            raise FieldError(f"{path}: the value contains a line break; remove it", path)
        if not all(c == "\t" or " " <= c <= "~" for c in value):
            raise FieldError(f"{path}: the value must be printable ASCII", path)


def _check_artifacts(output: Output, where: str) -> None:
    names: dict[str, str] = {}
    for index, path in enumerate(output.artifacts):
        at = f"{where}[{index}]"
        parts = path.rstrip("/").split("/")
        if not path or path.startswith("/") or any(part in {"", ".", ".."} for part in parts):
            raise FieldError(
                f"{at}: must be a relative path below the task's folder, without `..` (found {path!r})", at
            )
        if any(ord(c) < 0x20 or ord(c) == 0x7F or c == "\\" for c in path):
            raise FieldError(f"{at}: {path!r} contains a control character or a backslash", at)
        if any(len(part.encode("utf-8", "surrogatepass")) > 200 for part in parts):
            raise FieldError(f"{at}: a file name in it has more than 200 bytes; shorten it", at)
        other = names.setdefault(parts[-1], path)
        if other != path and isinstance(output.destination, Remote):
            raise FieldError(
                f"{at}: {path!r} and {other!r} would both be uploaded as {parts[-1]!r}; rename one",
                at,
            )
