"""A task's place in a trace, as W3C Trace Context has it (https://www.w3.org/TR/trace-context/).

A dispatch, or `metadata` of its document, names the span that the task belongs to. The task's own span has an id that
its attempt decides, so that a supervisor that is started again knows it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

PARENT, STATE = "traceparent", "tracestate"
SAMPLED = 0x01
_PARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<rest>-.*)?"
)
_STATE = re.compile(r"[\x20-\x7e]{1,512}")


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """A span's ids."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    flags: int = SAMPLED
    state: str = ""
    """What tracing systems add for themselves."""

    @property
    def sampled(self) -> bool:
        """Whether the trace is recorded, as whoever began it decided."""
        return bool(self.flags & SAMPLED)

    @property
    def header(self) -> str:
        """As `traceparent` has it."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags & SAMPLED:02x}"

    @property
    def env(self) -> dict[str, str]:
        """The variables that tell a program about it."""
        return {"TRACEPARENT": self.header, **({"TRACESTATE": self.state} if self.state else {})}


def parse(header: Any, state: Any = None) -> Context | None:
    """The span that a `traceparent` names; None where it is malformed. A malformed `tracestate` is left out."""
    match = _PARENT.fullmatch(header) if isinstance(header, str) else None
    if match is None or match["version"] == "ff" or (match["version"] == "00" and match["rest"]):
        return None
    if not match["trace"].strip("0") or not match["span"].strip("0"):
        return None
    kept = state if isinstance(state, str) and _STATE.fullmatch(state) else ""
    return Context(trace_id=match["trace"], span_id=match["span"], flags=int(match["flags"], 16), state=kept)


def parent_of(header: Any, state: Any, metadata: Mapping[str, Any] | None) -> tuple[Context | None, str]:
    """The span that a task belongs to, and what is wrong with the one that is named; empty: nothing.

    Args:
        header: `traceparent` of the dispatch, which comes before that of the document.
        state: its `tracestate`.
        metadata: of the document.
    """
    inside = metadata or {}
    place = PARENT if header is not None else f"metadata.{PARENT}"
    if header is None:
        header, state = inside.get(PARENT), inside.get(STATE)
    if header is None:
        return None, ""
    if (found := parse(header, state)) is not None:
        return found, ""
    return None, f"{place}: ignored, it is not 00-TRACE-SPAN-FLAGS in hexadecimal; the task has a trace of its own"


def of_task(name: str, parent: Context | None) -> Context:
    """A task's own span: in its parent's trace, or in a new one.

    Args:
        name: names the attempt, and no other one anywhere.
    """
    span_id = digest(f"span {name}", 16)
    if parent is None:
        return Context(trace_id=digest(f"trace {name}", 32), span_id=span_id)
    return msgspec.structs.replace(parent, span_id=span_id)


def digest(name: str, digits: int) -> str:
    """So many hexadecimal digits that depend on the name only."""
    return hashlib.sha256(name.encode()).hexdigest()[:digits]
