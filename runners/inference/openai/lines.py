"""One line of a batch file: its envelope, and why it cannot be served."""

from __future__ import annotations

from typing import Any, cast, get_args

import msgspec

from runners.data.openai_batch import ENVELOPE, Endpoint

EMBEDDINGS = "/v1/embeddings"


class LineFault(Exception):
    """A line that cannot be served. The other lines are not concerned.

    Args:
        custom_id: of the line; None: it has none that can be read.
        param: the field that is wrong, without `body`; None: the line as a whole.
        status: of HTTP, as a server would answer it.
    """

    def __init__(
        self, message: str, *, custom_id: str | None = None, param: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.message = message
        self.custom_id = custom_id
        self.param = param
        self.status = status


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One request."""

    custom_id: str
    url: Endpoint
    body: dict[str, Any]


def read_line(data: bytes | None) -> Line:
    """A line's envelope. Fields that it has beside the four are without effect.

    Args:
        data: None: it was too long to be read.

    Raises:
        LineFault: it cannot be served.
    """
    if data is None:
        raise LineFault("the line is too long")
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LineFault(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise LineFault(f"expected an object with {', '.join(ENVELOPE)} (found {type(value).__name__})")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineFault("custom_id: expected a text, by which its answer is found", param="custom_id")
    for name, wrong in (
        ("method", None if value.get("method") == "POST" else "expected 'POST'"),
        ("url", None if value.get("url") in get_args(Endpoint) else f"expected one of {', '.join(get_args(Endpoint))}"),
        ("body", None if isinstance(value.get("body"), dict) else "expected an object with the request's fields"),
    ):
        if wrong is not None:
            found = "" if name == "body" else f" (found {value.get(name)!r:.80})"
            raise LineFault(f"{name}: {wrong}{found}", custom_id=custom_id, param=name)
    return Line(custom_id=custom_id, url=cast("Endpoint", value["url"]), body=value["body"])
