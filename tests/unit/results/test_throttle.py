from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.results.throttle import Throttle


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def throttle(rate: int | None, clock: Clock, shared: Path | None = None) -> Throttle:
    return Throttle(rate, shared, clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize("shared", [False, True])
def test_a_long_stream_keeps_the_rate_in_small_sleeps(shared: bool, tmp_path: Path) -> None:
    clock = Clock()
    bucket = throttle(1000, clock, tmp_path / "bucket" if shared else None)
    for _ in range(100):
        bucket.take(100)
    assert clock.now - 1000 == pytest.approx(10_000 / 1000, abs=0.11)
    assert max(clock.slept) <= 0.11


@given(st.lists(st.integers(1, 500), min_size=1, max_size=50), st.integers(100, 100_000))
def test_never_faster_than_the_rate(sizes: list[int], rate: int) -> None:
    clock = Clock()
    bucket = throttle(rate, clock)
    for size in sizes:
        bucket.take(size)
    assert clock.now - 1000 >= sum(sizes) / rate - 0.1 - 1e-6


def test_idle_time_is_not_saved_up() -> None:
    clock = Clock()
    bucket = throttle(1000, clock)
    bucket.take(100)
    clock.now += 3600
    before = clock.now
    for _ in range(10):
        bucket.take(100)
    assert clock.now - before == pytest.approx(0.9, abs=0.01)


def test_two_senders_share_one_rate(tmp_path: Path) -> None:
    clock = Clock()
    first, second = (throttle(1000, clock, tmp_path / "bucket") for _ in range(2))
    for _ in range(50):
        first.take(100)
        second.take(100)
    assert clock.now - 1000 == pytest.approx(10.0, abs=0.11)


@pytest.mark.parametrize(
    "state", [b"", b"x", struct.pack("<d", 9e9), struct.pack("<d", float("nan")), b"\x07\x9d\xf1", b"\xff" * 8]
)
def test_a_state_from_before_the_boot_or_a_broken_one_holds_nobody_up(state: bytes, tmp_path: Path) -> None:
    (tmp_path / "bucket").write_bytes(state)
    clock = Clock()
    throttle(1000, clock, tmp_path / "bucket").take(100)
    assert clock.now - 1000 <= 0.2


def test_without_a_rate_nothing_waits(tmp_path: Path) -> None:
    clock = Clock()
    bucket = throttle(None, clock, tmp_path / "bucket")
    bucket.take(10**12)
    assert clock.slept == []
    assert bucket.chunk_bytes(65536) == 65536
    assert not (tmp_path / "bucket").exists()


def test_chunks_are_small_where_the_rate_is() -> None:
    assert throttle(10_000, Clock()).chunk_bytes(65536) == 1000
    assert throttle(1, Clock()).chunk_bytes(65536) == 1
    assert throttle(10**9, Clock()).chunk_bytes(65536) == 65536
