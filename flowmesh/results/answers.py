"""What a server said, or why it said nothing, in a few words for an error. Bounded, whatever a server sends."""

from __future__ import annotations

import email.utils
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import requests

MAX_RETRY_AFTER_S = 300.0
ANSWER_SHOWN = 200
_ANSWER_READ = 4096


def answer_of(response: requests.Response, timeout_s: float) -> str:
    """The beginning of what the server said, as far as it says it in that time; empty where it cannot be read."""
    import urllib3.exceptions

    until, data = time.monotonic() + timeout_s, b""
    try:
        while len(data) < _ANSWER_READ and time.monotonic() < until:
            more: Any = response.raw.read1(_ANSWER_READ - len(data), decode_content=True)
            if not more:
                break
            data += more
    except (OSError, urllib3.exceptions.HTTPError):
        pass  # what there is of it is better than nothing
    return data.decode("utf-8", "replace")


def retry_after_s(value: str | None) -> float:
    """Retry-After as seconds, whichever of its two forms it has; 0 where it has none. Bounded."""
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
    """What is behind the wrappers of requests and urllib3."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        nested = [getattr(error, "reason", None), error.__cause__, *error.args, error.__context__]
        error = next((e for e in nested if isinstance(e, BaseException) and id(e) not in seen), error)
    return error


def in_words(error: BaseException, cause: BaseException, timeout_s: float) -> str:
    """An attempt's failure in a few words; never the wrappers' own, which quote the whole address."""
    if isinstance(cause, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no answer within {timeout_s:g} s"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:ANSWER_SHOWN]}"
