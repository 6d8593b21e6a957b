"""What a server answered, or why it did not, as short text for an error. Bounded, whatever a server sends."""

from __future__ import annotations

import email.utils
import json
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any

from flowmesh.web.session import certificate_remedy

if TYPE_CHECKING:
    import requests

MAX_RETRY_AFTER_S = 300.0
TEXT_SHOWN = 200
"""Characters of an answer that an error quotes."""
_BYTES_READ = 4096


def read_text(response: requests.Response, timeout_s: float) -> str:
    """The start of the answer's body, as much as arrives within `timeout_s`; empty where it cannot be read."""
    import urllib3.exceptions

    until, data = time.monotonic() + timeout_s, b""
    try:
        while len(data) < _BYTES_READ and time.monotonic() < until:
            more: Any = response.raw.read1(_BYTES_READ - len(data), decode_content=True)
            if not more:
                break
            data += more
    except (OSError, urllib3.exceptions.HTTPError):
        pass  # use what has arrived
    return data.decode("utf-8", "replace")


def reported_error(response: requests.Response, timeout_s: float) -> str:
    """The error in the JSON of an answer whose status says success; empty: there is none.

    That is `ok` or `success` false, or an `error` without either. What is no short JSON is not waited for.
    """
    if "json" not in response.headers.get("Content-Type", "").lower():
        return ""
    length = response.headers.get("Content-Length", "")
    if not length.isdecimal() or int(length) > _BYTES_READ:
        return ""
    text = read_text(response, timeout_s)
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(said, dict):
        return ""
    told = [said[name] for name in ("ok", "success") if isinstance(said.get(name), bool)]
    return text if False in told or (not told and said.get("error")) else ""


def retry_after_s(value: str | None) -> float:
    """Retry-After in seconds, from either of its two forms, at most MAX_RETRY_AFTER_S; 0 where it is missing or bad."""
    if value is None:
        return 0.0
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), MAX_RETRY_AFTER_S)
    try:
        at = email.utils.parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError):
        return 0.0
    return min(max(at - time.time(), 0.0), MAX_RETRY_AFTER_S)


def innermost(error: BaseException) -> BaseException:
    """The cause inside the exceptions of requests and urllib3."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        nested = [getattr(error, "reason", None), error.__cause__, *error.args, error.__context__]
        error = next((e for e in nested if isinstance(e, BaseException) and id(e) not in seen), error)
    return error


def is_unresolved(error: BaseException, cause: BaseException) -> bool:
    """Whether an attempt failed because the server's name has no address."""
    return isinstance(cause, socket.gaierror) or "NameResolutionError" in repr(error)


def describe_failure(error: BaseException, cause: BaseException, timeout_s: float) -> str:
    """Why an attempt got no answer. Never the text of requests' own exceptions, which contains the whole URL."""
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({cause.verify_message}); {certificate_remedy()}"
    if isinstance(cause, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no answer within {timeout_s:g} s"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:TEXT_SHOWN]}"
