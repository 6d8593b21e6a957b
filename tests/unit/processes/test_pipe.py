"""The framed pipe: frames stay apart, garbage is one error, a full pipe drops progress and nothing else."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.processes.pipe import MAX_FRAME, Cancel, Finished, FrameError, Hello, Phase, Pipe, Progress


@pytest.fixture
def pair():
    near, far = Pipe.pair()
    yield near, far
    near.close()
    far.close()


FRAMES = [Hello(1, 5), Phase("load"), Progress(1, 2, "steps", {"loss": 0.5}), Finished(ok=True), Cancel("why", True)]


def test_frames_arrive_as_they_were_sent(pair) -> None:
    near, far = pair
    for frame in FRAMES:
        assert far.send(frame)
    assert [near.poll() for _ in FRAMES] == FRAMES
    assert near.poll() is None


@given(st.binary(min_size=1, max_size=2000))
def test_garbage_is_one_error_and_the_next_frame_is_whole(junk: bytes) -> None:
    near, far = Pipe.pair()
    try:
        far.sock.send(junk)
        far.send(Phase("after"))
        with contextlib.suppress(FrameError):  # a random datagram may happen to be a frame
            near.poll()
        assert near.poll() == Phase("after")
    finally:
        near.close()
        far.close()


def test_a_frame_that_is_too_large_is_refused_on_both_sides(pair) -> None:
    near, far = pair
    with pytest.raises(FrameError, match="at most"):
        far.send(Phase("x" * MAX_FRAME))
    far.sock.send(os.urandom(MAX_FRAME + 10))
    with pytest.raises(FrameError, match="more than"):
        near.poll()
    assert near.poll() is None


def test_a_full_pipe_drops_what_may_be_dropped(pair) -> None:
    near, far = pair
    sent = 0
    while far.send(Progress(sent), drop=True):
        sent += 1
    assert sent > 10
    assert not far.send(Progress(sent), drop=True)
    assert [near.poll() for _ in range(sent)] == [Progress(n) for n in range(sent)]


def test_the_end_is_an_end(pair) -> None:
    near, far = pair
    far.send(Phase("last"))
    far.close()
    assert near.poll() == Phase("last")
    with pytest.raises(EOFError):
        near.poll()
