"""Moments that a restarted supervisor counts from, and what the machine's clock does to them: nothing."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pytest

from flowmesh.execution import boot_clock
from tests.kit.clock_shim import Clock, compiler
from tests.kit.support import ROOT

HOUR_S = 3600


def ago(seconds: float) -> str:
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)).isoformat()


def test_an_age_is_counted_from_the_boot_whatever_the_clock_says() -> None:
    marked = boot_clock.mark()
    assert 0 <= boot_clock.age_s(marked, ago(50_000)) < 60
    assert 0 <= boot_clock.age_s(marked, ago(-50_000)) < 60


@pytest.mark.parametrize("marked", [None, "", "another-boot 5.0"])
def test_after_another_boot_the_clock_has_to_do(marked: str | None) -> None:
    assert 50_000 <= boot_clock.age_s(marked, ago(50_000)) < 50_060
    assert boot_clock.age_s(marked, ago(-50_000)) == 0


@pytest.mark.skipif(compiler() is None, reason="needs a C compiler to make a clock that can be set")
def test_a_clock_that_was_set_is_in_doubt_and_a_step_of_ntp_is_not(tmp_path: Path) -> None:
    """In a process of its own, whose clock is set between two looks at it."""
    watch = Clock(tmp_path / "clock")
    program = (
        "import sys, time\nfrom flowmesh.execution.boot_clock import SteadyClock\nsteady = SteadyClock()\n"
        "for line in sys.stdin:\n    print(time.time() - steady.now().timestamp(), flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT), **watch.env}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    def wrong_by() -> float:
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    try:
        assert abs(wrong_by()) < 1
        for offset_s in (800 * HOUR_S, -800 * HOUR_S):
            watch.set(offset_s)
            assert wrong_by() == pytest.approx(offset_s, abs=60)
        watch.set(0)
        assert abs(wrong_by()) < 1
        watch.set(30)
        assert abs(wrong_by()) < 1
    finally:
        process.kill()
        _, told = process.communicate()
    assert told.count("clock was set by") == 1
