"""What Redis pushes to a subscriber, parsed whatever pieces it comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import InvalidResponse, NoPermissionError, ResponseError

from flowmesh.bus.pushes import Parser, Push


def bulk(text: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(text), text)


def sent(push: Push) -> bytes:
    """As Redis writes it."""
    kind, channel, data = push
    if kind == b"subscribe":
        return b"*3\r\n" + bulk(kind) + bulk(channel) + b":%s\r\n" % data
    return (
        b"*3\r\n" + bulk(kind) + bulk(channel) + bulk(data)
        if kind == b"message"
        else b"*2\r\n" + bulk(kind) + bulk(b"")
    )


PUSHES = st.one_of(
    st.tuples(st.just(b"message"), st.binary(max_size=8), st.binary(max_size=300) | st.just(b"\r\n$5\r\n*3\r\n")),
    st.tuples(st.just(b"subscribe"), st.just(b"tasks"), st.integers(0, 99).map(lambda n: b"%d" % n)),
    st.just((b"pong", b"", b"")),
)


@given(st.lists(PUSHES, max_size=12), st.lists(st.integers(1, 60), max_size=40))
def test_messages_are_the_same_however_they_are_cut(pushes: list[Push], cuts: list[int]) -> None:
    stream = b"".join(map(sent, pushes))
    parser, found, at = Parser(), [], 0
    for size in [*cuts, len(stream)]:
        found += parser.feed(stream[at : at + size])
        at += size
    assert found == pushes


def test_a_long_message_in_many_parts_is_whole() -> None:
    push = b"message", b"tasks", bytes(range(256)) * 40_000
    stream, parser = sent(push), Parser()
    parts = [stream[at : at + 65536] for at in range(0, len(stream), 65536)]
    assert [found for part in parts for found in parser.feed(part)] == [push]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"-NOPERM this user has no permissions\r\n", NoPermissionError),
        (b"-ERR unknown command\r\n", ResponseError),
        (b"HTTP/1.1 400 Bad Request\r\n", InvalidResponse),
        (b"*three\r\n", InvalidResponse),
    ],
)
def test_what_is_no_message_is_an_error_of_its_kind(text: bytes, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        Parser().feed(text)


def test_an_answer_outside_of_a_subscription_is_one() -> None:
    assert Parser().feed(b"+PONG\r\n") == [(b"pong", b"", b"")]
