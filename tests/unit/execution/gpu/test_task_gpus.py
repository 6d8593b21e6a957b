"""Whose doing a GPU's fault was, and what it makes of a verdict."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from flowmesh.execution.gpu.task_gpus import blames
from flowmesh.messages.job import Exit, Fault, Outcome
from flowmesh.node.devices import GpuProcess
from flowmesh.node.health import Finding
from flowmesh.node.release_state import Baseline
from flowmesh.node.xid import XidVerdict
from flowmesh.processes.tree import is_same_or_below
from flowmesh.tasks import machine
from flowmesh.tasks.machine import State, Task, step
from flowmesh.tasks.verdicts import Kind, Stop, judge

FAULT = "Xid 31 (page fault) on GPU-a"


def failed(fault: Fault | None) -> Outcome:
    return Outcome(attempt=1, ok=False, fault=fault, message="the runner's words")


@pytest.mark.parametrize(
    ("exit_", "outcome", "stop", "kind"),
    [
        (Exit(signal=9), None, None, Kind.GPU_FAULT),
        (Exit(code=1), failed(Fault.ERROR), None, Kind.GPU_FAULT),
        (Exit(code=1), failed(None), None, Kind.GPU_FAULT),
        (Exit(code=3), Outcome(attempt=1, ok=True), None, Kind.GPU_FAULT),
        (Exit(code=0), Outcome(attempt=1, ok=True), None, Kind.OK),
        (Exit(code=1), failed(Fault.GPU_OOM), None, Kind.GPU_OOM),
        (Exit(code=1), failed(Fault.BAD_REQUEST), None, Kind.BAD_REQUEST),
        (Exit(signal=9, oom_kills=1), None, None, Kind.HOST_OOM),
        (Exit(signal=9), None, Stop.CANCEL, Kind.CANCELLED),
        (Exit(signal=9), None, Stop.GPU_FAULT, Kind.GPU_FAULT),
    ],
)
def test_a_fault_explains_a_crash_or_an_error_and_nothing_else(
    exit_: Exit, outcome: Outcome | None, stop: Stop | None, kind: Kind
) -> None:
    verdict = judge(exit_, outcome, stop, stop_detail=FAULT if stop else "", gpu_fault=FAULT)
    assert verdict.kind is kind
    if kind is Kind.GPU_FAULT:
        assert verdict.retryable
        assert FAULT in verdict.message
        assert stop is not None or FAULT in verdict.evidence
    assert judge(exit_, outcome, stop, stop_detail="x").kind is not Kind.GPU_FAULT or stop is Stop.GPU_FAULT


def test_the_runners_own_words_stand_beside_the_fault() -> None:
    verdict = judge(Exit(code=1), failed(Fault.ERROR), None, gpu_fault=FAULT)
    assert verdict.message == f"GPU fault: {FAULT} (the runner's words)"


def test_a_task_that_its_slot_cannot_take_goes_back_unstarted() -> None:
    task, actions = step(Task(), machine.StopRequested(Stop.NODE_FAULT, "closed"))
    assert task.state is State.DELIVERING
    assert actions == [machine.LeaveQueue(), machine.Deliver()]
    assert task.verdict is not None
    assert (task.verdict.kind, task.verdict.retryable) == (Kind.NODE_FAULT, True)


@pytest.mark.parametrize(
    ("on_gpu", "own", "before", "blamed"),
    [
        ({7}, {7, 8}, set(), True),
        ({7, 99}, {7}, {99}, True),
        ({99}, {7}, {99}, False),
        ({99}, {7}, set(), False),  # ours was seen: pids mean the same here, and this one is not ours
        (set(), {7}, set(), True),  # nobody is on it any more: the slot was ours alone
        ({4242}, set(), set(), True),  # never seen by its own number: the driver counts in another namespace
        ({99}, set(), {99}, False),
    ],
)
def test_whose_fault_it_was(on_gpu: set[int], own: set[int], before: set[int], blamed: bool) -> None:
    finding = Finding(verdict=XidVerdict.APPLICATION, message=FAULT, uuids=("GPU-a",), pids=frozenset(on_gpu), xid=31)
    baselines = {"GPU-a": Baseline("GPU-a", 0, tuple(GpuProcess(pid) for pid in before))}
    assert blames(finding, ("GPU-a", "GPU-b"), own, baselines) is blamed
    assert blames(finding, ("GPU-b",), own, {}) is False


def test_a_thread_is_below_what_its_process_is_same_or_below() -> None:
    # In a container the driver may name the thread that made the context in place of its process.
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, threading\n"
            "threading.Thread(target=lambda: (print(threading.get_native_id(), flush=True), sys.stdin.read())).start()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    thread = int(child.stdout.readline())
    assert thread != child.pid
    assert is_same_or_below(thread, child.pid)
    assert is_same_or_below(thread, os.getpid())
    assert not is_same_or_below(os.getpid(), child.pid)
    child.communicate("")
    assert not is_same_or_below(thread, os.getpid()), "it is gone"
