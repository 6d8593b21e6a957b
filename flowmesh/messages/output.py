"""`spec.output`: where a task's results go, as its author wrote it and as the node reads it.

`read_output` is the only way in: what it returns can be delivered to as it stands, with the address settled and
every name and header checked.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit

import msgspec

from flowmesh.errors import FieldError
from flowmesh.messages.checking import convert, nearest

DEFAULT_TIMEOUT_S = 15.0
MAX_TIMEOUT_S = 24 * 3600.0
METHODS = ("POST", "PUT", "PATCH")
RESULTS_PATH = "/api/v1/results"

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # a header's name, RFC 9110 5.6.2
_FRAMING = frozenset(
    ("connection", "content-length", "expect", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade")
)
_IN_SEGMENT = "@:=+"  # what a task id may hold and a URL's segment need not escape


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class LocalDestination(_Strict, frozen=True, tag_field="type", tag="local"):
    """Results stay on the node's disk."""

    path: str | None = None
    """The folder above the task's own; see docs/contract.md, 3."""


class HttpDestination(_Strict, frozen=True, tag_field="type", tag="http"):
    """Results are sent, and stay on the node's disk too."""

    url: str | None = None
    """Never None in what `read_output` returns."""
    method: str = "POST"
    headers: dict[str, str] = {}
    timeout_s: float = msgspec.field(name="timeoutSec", default=DEFAULT_TIMEOUT_S)
    """Of one attempt: to connect, and for each wait for the other side to go on."""


Destination = LocalDestination | HttpDestination


class Output(_Strict, frozen=True):
    """`spec.output`"""

    destination: LocalDestination | HttpDestination = LocalDestination()
    artifacts: tuple[str, ...] = ()
    """Paths below the task's folder: files are uploaded, folders packed and uploaded."""


def read_output(value: Any, *, orchestrator_url: str | None = None, where: str = "spec.output") -> Output:
    """`spec.output` (None: the task has none), checked, with `url` filled in from the node's orchestrator.

    Raises:
        FieldError: names the field, what was found and what is allowed. Never shows a header's value or a password.
    """
    if value is None:
        return Output()
    output = convert(value, Output, where=where)
    _check_artifacts(output, f"{where}.artifacts")
    destination = output.destination
    if isinstance(destination, LocalDestination):
        return output
    return msgspec.structs.replace(output, destination=_settled(destination, orchestrator_url, f"{where}.destination"))


def file_url(url: str, task_id: str, name: str | None = None) -> str:
    """URL that files of a task are posted to (`name` None), or that one is fetched from (docs/contract.md, 2).

    The address to fetch from carries no user, password or query: it goes into results, which others read.
    `{name}` as the name stays as it is, for a template.
    """
    parts = urlsplit(url)
    path = f"{parts.path.rstrip('/')}/{quote(task_id, safe=_IN_SEGMENT)}/files"
    if name is None:
        return urlunsplit(parts._replace(path=path, fragment=""))
    tail = name if name == "{name}" else quote(name, safe="")
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(SplitResult(parts.scheme, host, f"{path}/{tail}", "", ""))


def check_url(url: str, where: str) -> None:
    """Raises FieldError where `url` is not an http(s) address. Shows only its scheme: the rest may hold secrets."""
    if any(ord(c) <= 0x20 or ord(c) == 0x7F for c in url):
        raise FieldError(f"{where}: an address without spaces and control characters is needed", where)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # its text would quote what may be a password
        raise FieldError(f"{where}: not an address; its host or its port cannot be read", where) from None
    if parts.scheme not in {"http", "https"}:
        found = f"found {parts.scheme!r}" if parts.scheme else "found none"
        raise FieldError(f"{where}: the scheme must be http or https ({found})", where)
    if not host:
        raise FieldError(f"{where}: no host in it; write http://HOST[:PORT]/PATH", where)


def _settled(destination: HttpDestination, orchestrator_url: str | None, where: str) -> HttpDestination:
    url = destination.url
    if url is None:
        if not orchestrator_url:
            raise FieldError(
                f"{where}.url: missing; an http destination needs one, as this node has no ORCHESTRATOR_BASE_URL",
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
    if not 0 < destination.timeout_s <= MAX_TIMEOUT_S:
        raise FieldError(
            f"{where}.timeoutSec: more than 0 and at most {MAX_TIMEOUT_S:.0f} seconds (found {destination.timeout_s})",
            f"{where}.timeoutSec",
        )
    _check_headers(destination.headers, f"{where}.headers")
    return msgspec.structs.replace(destination, url=url, method=method)


def _check_headers(headers: dict[str, str], where: str) -> None:
    seen: set[str] = set()
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name):
            shown = name.partition(":")[0][:80]  # behind a colon stands a value, which may be a secret
            raise FieldError(f"{where}: {shown!r} cannot be the name of a header", where)
        path, lower = f"{where}.{name}", name.lower()
        if lower in _FRAMING:
            raise FieldError(f"{path}: the connection's own header; the node sets it itself", path)
        if lower in seen:
            raise FieldError(f"{path}: given twice; case makes no difference in a header's name", path)
        seen.add(lower)
        if "\r" in value or "\n" in value:
            raise FieldError(f"{path}: a line break in a header's value", path)
        if not all(c == "\t" or " " <= c <= "~" for c in value):
            raise FieldError(f"{path}: only printable ASCII can be sent in a header", path)


def _check_artifacts(output: Output, where: str) -> None:
    names: dict[str, str] = {}
    for index, path in enumerate(output.artifacts):
        at = f"{where}[{index}]"
        parts = path.rstrip("/").split("/")
        if not path or path.startswith("/") or any(part in {"", ".", ".."} for part in parts):
            raise FieldError(f"{at}: a path below the task's folder is needed, without `..` (found {path!r})", at)
        if any(ord(c) < 0x20 or ord(c) == 0x7F or c == "\\" for c in path):
            raise FieldError(f"{at}: a control character or a backslash in {path!r}", at)
        if any(len(part.encode("utf-8", "surrogatepass")) > 200 for part in parts):
            raise FieldError(f"{at}: a name of more than 200 bytes", at)
        other = names.setdefault(parts[-1], path)
        if other != path and isinstance(output.destination, HttpDestination):
            raise FieldError(
                f"{at}: {path!r} and {other!r} would both be uploaded as {parts[-1]!r}; rename one",
                at,
            )
