"""W3C Trace Context: what is a traceparent, where it may stand, and the ids of a task's own span."""

from __future__ import annotations

import pytest

from flowmesh.messages.trace import Context, of_task, parent_of, parse

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_a_traceparent_is_read_and_written_as_it_was() -> None:
    found = parse(GOOD, "vendor=x")
    assert found == Context(trace_id=TRACE, span_id=SPAN, flags=1, state="vendor=x")
    assert found.header == GOOD
    assert found.env == {"TRACEPARENT": GOOD, "TRACESTATE": "vendor=x"}
    assert not parse(f"00-{TRACE}-{SPAN}-00").sampled
    assert parse(f"01-{TRACE}-{SPAN}-01-more").trace_id == TRACE, "a later version may have more fields"
    assert parse(GOOD, "bad\n").state == ""


@pytest.mark.parametrize(
    "header",
    [
        "", "x", None, 5, ["a"], GOOD.upper(), f"{GOOD}-more", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{SPAN}", f" {GOOD}", f"{GOOD}\n",
    ],
)  # fmt: skip
def test_what_is_malformed_is_none(header: object) -> None:
    assert parse(header) is None


def test_the_dispatch_comes_before_the_document() -> None:
    other = f"00-{TRACE}-{'1' * 16}-01"
    assert parent_of(GOOD, None, {"traceparent": other})[0].span_id == SPAN
    assert parent_of(None, None, {"traceparent": other})[0].span_id == "1" * 16
    assert parent_of(None, None, None) == (None, "")
    assert parent_of(None, None, {"traceparent": "x"})[1].startswith("metadata.traceparent: ignored")
    assert parent_of(7, None, {})[1].startswith("traceparent: ignored")


def test_a_tasks_span_depends_on_its_attempt_only() -> None:
    parent = parse(f"00-{TRACE}-{SPAN}-00", "a=b")
    own = of_task("node:7", parent)
    assert own == of_task("node:7", parent)
    assert (own.trace_id, own.sampled, own.state) == (TRACE, False, "a=b")
    assert own.span_id not in (SPAN, of_task("node:8", parent).span_id)
    alone = of_task("node:7", None)
    assert alone.sampled
    assert parse(alone.header) == alone
