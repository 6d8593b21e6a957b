"""Verdicts come from evidence: each kind from what shows it, and nothing else."""

from __future__ import annotations

import pytest

from flowmesh.messages.job import Exit, Fault, Outcome
from flowmesh.tasks.verdicts import Kind, Stop, describe_exit, event_fields, judge

OK = Outcome(attempt=1, ok=True)


def failed(fault: Fault | None, message: str = "why") -> Outcome:
    return Outcome(attempt=1, ok=False, fault=fault, message=message)


@pytest.mark.parametrize(
    ("exit_", "outcome", "stop", "kind"),
    [
        (Exit(code=0), OK, None, Kind.OK),
        (Exit(code=0), OK, Stop.CANCEL, Kind.OK),
        (Exit(code=1), failed(Fault.ERROR), None, Kind.ERROR),
        (Exit(code=1), failed(None), None, Kind.ERROR),
        (Exit(code=1), failed(Fault.BAD_REQUEST), None, Kind.BAD_REQUEST),
        (Exit(code=1), failed(Fault.GPU_OOM), None, Kind.GPU_OOM),
        (Exit(code=1), failed(Fault.HOST_OOM), None, Kind.HOST_OOM),
        (Exit(code=1), failed(Fault.CRASH), None, Kind.CRASH),
        (Exit(code=1), failed(Fault.CANCELLED), Stop.TIMEOUT, Kind.TIMEOUT),
        (Exit(code=1), failed(Fault.CANCELLED), None, Kind.CRASH),
        (Exit(signal=9, oom_kills=1), None, None, Kind.HOST_OOM),
        (Exit(signal=9, oom_kills=1), None, Stop.CANCEL, Kind.CANCELLED),
        (Exit(signal=9), None, None, Kind.CRASH),
        (Exit(signal=11), None, None, Kind.CRASH),
        (Exit(code=0), None, None, Kind.CRASH),
        (Exit(signal=11), OK, None, Kind.CRASH),
        (Exit(signal=9), None, Stop.HANG, Kind.HANG),
        (Exit(signal=9), None, Stop.DRAIN, Kind.DRAINED),
    ],
)
def test_each_kind(exit_: Exit, outcome: Outcome | None, stop: Stop | None, kind: Kind) -> None:
    verdict = judge(exit_, outcome, stop)
    assert verdict.kind is kind
    assert verdict.ok == (kind is Kind.OK)
    if not verdict.ok:
        assert verdict.message
        assert "\n" not in verdict.message


def test_the_signal_is_named() -> None:
    verdict = judge(Exit(signal=11), None, None)
    assert "SIGSEGV" in verdict.message
    assert describe_exit(Exit(signal=11)) == "killed by SIGSEGV"
    assert event_fields(verdict)["exit"]["signal"] == "SIGSEGV"


@pytest.mark.parametrize("exit_", [Exit(code=0), Exit(code=1), Exit(signal=9)])
def test_an_outcome_that_was_announced_and_is_gone_was_lost_by_the_node(exit_: Exit) -> None:
    assert judge(exit_, None, None, finished_frame=True).kind is Kind.NODE_FAULT
    assert judge(exit_, None, None, gpu_fault="XID 79", finished_frame=True).kind is Kind.NODE_FAULT
    assert judge(exit_, None, Stop.CANCEL, finished_frame=True).kind is Kind.CANCELLED
    assert judge(exit_, None, None).kind is Kind.CRASH


def test_what_killed_a_rank_may_be_its_gpu() -> None:
    verdict = judge(Exit(code=1), failed(Fault.CRASH, "rank 1 was killed by SIGABRT"), None, gpu_fault="Xid 79")
    assert verdict.kind is Kind.GPU_FAULT
    assert verdict.message == "GPU fault: Xid 79 (rank 1 was killed by SIGABRT)"


def test_the_kernels_count_is_the_evidence_for_memory() -> None:
    verdict = judge(Exit(signal=9, oom_kills=2), None, None)
    assert "oom_kill +2" in verdict.evidence
    assert verdict.retryable


@pytest.mark.parametrize(
    ("kind", "again"),
    [
        ("error", False),
        ("bad_request", False),
        ("cancelled", False),
        ("timeout", False),
        ("crash", True),
        ("drained", True),
    ],
)
def test_whether_a_retry_makes_sense(kind: str, again: bool) -> None:
    from flowmesh.tasks.verdicts import Verdict

    assert Verdict(kind=Kind(kind)).retryable is bool(again)
