"""A GPU that cannot be used closes its slot with a reason; the slot opens again by itself. On a real node."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from flowmesh.tasks.catalogue import BUILTIN
from tests.kit.gpu_node import (
    GIB,
    MIB,
    TWO_GPUS,
    A,
    B,
    MakeGpuNode,
    held,
    samples,
)
from tests.kit.support import Orchestrator, until

pytestmark = pytest.mark.redis
USED = f"set {A} used"
NOTHING_HEAVY = "".join(
    f'[task_types.{each.name}]\nrunner = "tests.kit.gpu_runners:LookRunner"\n' for each in BUILTIN if each.requires
)
"""The canary's environment then has nothing to import: tests.kit.gpu_runners:canary needs no torch."""


def test_a_gpu_that_does_not_come_back_closes_the_slot_until_it_does(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node()
    task_id, pid = held(orchestrator, node)
    node.stub.change(USED, f"{USED} {20 * GIB}")
    node.stub.add(f"process {A} {pid} {19 * GIB}")
    samples(node)
    node.let_go(task_id)
    end = orchestrator.wait_end(task_id)
    assert end["type"] == "TASK_SUCCEEDED"
    held_by = end["payload"]["resources"]["gpu_held"]
    assert held_by.startswith(f"{A} is still held by the task: pid {pid} ")
    assert end["payload"]["resources"]["gpus"][A]["processes_after"] == [pid]
    assert "gpu_release_ms" not in end["payload"]["resources"]

    node.wait_word("DEGRADED")
    node.wait_reason(f"{A} is used by a foreign process: pid {pid}")  # the task has ended, so it counts as foreign
    beat = orchestrator.wait_worker_event("HEARTBEAT")
    while "degraded" not in beat["metrics"]:
        orchestrator.worker_events.clear()
        beat = orchestrator.wait_worker_event("HEARTBEAT")
    assert A in beat["metrics"]["degraded"]

    node.stub.remove(f"process {A}")
    node.wait_reason("MiB more in use than when it was idle before")
    assert node.status() == "DEGRADED"
    node.stub.change(USED, f"{USED} {510 * MIB}")
    node.wait_word("IDLE")
    assert node.reason() == ""
    assert orchestrator.run("w1", {"taskType": "look"})["type"] == "TASK_SUCCEEDED"


def test_the_orchestrators_idle_after_a_success_does_not_hide_a_closed_slot(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node()
    task_id, _ = held(orchestrator, node)
    node.stub.change(USED, f"{USED} {20 * GIB}")
    node.let_go(task_id)
    orchestrator.wait_end(task_id)
    orchestrator.redis.hset("worker:w1", "status", "IDLE")  # docs/contract.md 1.1: it does so when it sees the success
    node.wait_word("DEGRADED", deadline_s=10)


def test_a_stranger_is_named_and_no_gpu_task_starts_beside_it(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node()
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        node.stub.add(f"process {B} {stranger.pid} {7 * GIB}")
        node.wait_word("DEGRADED")  # found by the check at a heartbeat, without a task
        reason = node.reason()
        assert reason.startswith(f"{B} is used by a foreign process: pid {stranger.pid} (user ")
        assert "time.sleep(100)" in reason
        assert reason.endswith("7168 MiB")
        light = orchestrator.run("w1", {"taskType": "echo"})
        assert light["type"] == "TASK_SUCCEEDED"
        end = orchestrator.run("w1", {"taskType": "look"})
        assert (end["type"], end["payload"]["error_kind"]) == ("TASK_FAILED", "node_fault")
        assert end["payload"]["retryable"] is True
        assert f"pid {stranger.pid}" in end["error"]
        assert node.status() == "DEGRADED"
    finally:
        stranger.kill()
        stranger.wait()
    node.stub.remove(f"process {B}")
    node.wait_word("IDLE")


def test_a_stranger_that_comes_just_before_a_task_puts_it_back(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node(env={"HEARTBEAT_INTERVAL_SEC": "60"})
    node.stub.add(f"process {A} 1 {GIB}")
    end = orchestrator.run("w1", {"taskType": "look"})
    assert (end["payload"]["error_kind"], end["payload"]["started_at"]) == ("node_fault", None)
    assert end["error"].startswith(f"not started: {A} is used by a foreign process: pid 1 ")
    assert node.status() == "DEGRADED"


@pytest.mark.parametrize("kind", ["process", "graphics"])
def test_a_process_of_the_nodes_own_that_is_left_on_a_gpu_keeps_the_slot_closed(
    orchestrator: Orchestrator, gpu_node: MakeGpuNode, kind: str
) -> None:
    node = gpu_node()
    child = psutil.Process(node.pid).children()[0].pid  # like a task's process that hangs in the driver
    node.stub.change(USED, f"{USED} {500 * MIB + 7 * GIB}")
    node.stub.add(f"{kind} {A} {child} {7 * GIB}")
    node.wait_word("DEGRADED")
    assert node.wait_reason(f"{A} is still held by a process of this node: pid {child} (user ")
    node.stub.remove(f"{kind} {A}")
    node.stub.change(USED, f"{USED} {500 * MIB}")
    node.wait_word("IDLE")


def test_a_display_server_is_nobody_to_wait_for(orchestrator: Orchestrator, gpu_node: MakeGpuNode) -> None:
    node = gpu_node(script=f"{TWO_GPUS}\ngraphics {A} 1 {100 * MIB}\n")
    task_id, _ = held(orchestrator, node)
    node.stub.change(USED, f"{USED} {800 * MIB}")
    node.stub.change(f"graphics {A}", f"graphics {A} 1 {400 * MIB}")
    node.let_go(task_id)
    end = orchestrator.wait_end(task_id)
    assert "gpu_held" not in end["payload"]["resources"]
    assert orchestrator.run("w1", {"taskType": "look"})["type"] == "TASK_SUCCEEDED"


def test_a_tasks_process_that_was_never_seen_on_its_gpu_is_not_called_a_stranger(
    orchestrator: Orchestrator, gpu_node: MakeGpuNode
) -> None:
    node = gpu_node(args=["--set", "gpu.sample_interval_s=60"])
    task_id, pid = held(orchestrator, node)
    node.stub.add(f"process {A} {pid} {GIB}")
    node.let_go(task_id)
    held_by = orchestrator.wait_end(task_id)["payload"]["resources"]["gpu_held"]
    assert held_by.startswith(f"{A} is still held by the task: pid {pid} ")


def test_strangers_may_be_allowed(orchestrator: Orchestrator, gpu_node: MakeGpuNode) -> None:
    node = gpu_node(script=f"{TWO_GPUS}\nprocess {A} 1 {GIB}\n", args=["--set", "gpu.allow_foreign=1"])
    end = orchestrator.run("w1", {"taskType": "look"})
    assert end["type"] == "TASK_SUCCEEDED"
    assert end["payload"]["resources"]["gpus"][A]["processes_before"] == [1]
    node.wait_word("IDLE")


def test_of_strangers_that_are_allowed_nobody_has_to_know_how_much_they_have(
    orchestrator: Orchestrator, gpu_node: MakeGpuNode
) -> None:
    node = gpu_node(script=f"{TWO_GPUS}\nprocess {A} 1 0\n", args=["--set", "gpu.allow_foreign=1"])
    task_id, _ = held(orchestrator, node)
    node.stub.change(USED, f"{USED} {9 * GIB}")
    node.let_go(task_id)
    end = orchestrator.wait_end(task_id)
    assert "gpu_held" not in end["payload"]["resources"]
    assert orchestrator.run("w1", {"taskType": "look"})["type"] == "TASK_SUCCEEDED"


def test_a_node_that_starts_beside_a_stranger_never_says_idle(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node(script=f"gpu {A} {GIB} X\nprocess {A} 1 {MIB}\n", wait="DEGRADED")
    orchestrator.hear(0.3)
    assert "IDLE" not in {event.get("status") for event in orchestrator.worker_events}
    node.stub.remove("process")
    node.wait_word("IDLE")


def test_what_waits_for_a_closed_slot_starts_when_it_opens(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node(args=["--set", "gpu.release_timeout_s=3"])
    first, _ = held(orchestrator, node)
    node.stub.change(USED, f"{USED} {20 * GIB}")
    node.let_go(first)
    second = orchestrator.dispatch("w1", {"taskType": "look"})
    node.wait_reason(A)
    assert not orchestrator.ends(second)
    node.stub.change(USED, f"{USED} {500 * MIB}")
    assert orchestrator.wait_end(second)["type"] == "TASK_SUCCEEDED"


def test_what_waits_too_long_for_a_closed_slot_goes_back_for_another_worker(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node()
    first, _ = held(orchestrator, node)
    node.stub.change(USED, f"{USED} {20 * GIB}")
    second = orchestrator.dispatch("w1", {"taskType": "look"})
    node.let_go(first)
    end = orchestrator.wait_end(second)
    assert (end["payload"]["error_kind"], end["payload"]["retryable"]) == ("node_fault", True)
    assert end["error"].startswith("not started: ")
    assert A in end["error"]
    assert node.status() == "DEGRADED"


def test_an_xid_of_the_tasks_own_is_its_verdict_and_leaves_the_slot_open(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node()
    for serial, then in enumerate(("die", "raise"), start=1):
        task_id, pid = held(orchestrator, node, then=then)
        node.stub.add(f"process {A} {pid} {MIB}")
        samples(node)
        node.stub.add(f"event {serial} {A} 8 31")
        node.stub.remove(f"process {A}")
        node.let_go(task_id)
        end = orchestrator.wait_end(task_id)
        payload = end["payload"]
        assert (payload["error_kind"], payload["retryable"]) == ("gpu_fault", True)
        fault = f"Xid 31 (page fault of a kernel: it accessed unmapped memory) on {A}"
        assert fault in end["error"]
        assert fault in payload["exit"]["evidence"]
        assert ("illegal memory access" in end["error"]) == (then == "raise")
        node.wait_word("IDLE")
    plain, _ = held(orchestrator, node, then="raise")
    node.let_go(plain)
    assert orchestrator.wait_end(plain)["payload"]["error_kind"] == "error"


def test_a_success_stays_one_whatever_the_driver_said(orchestrator: Orchestrator, gpu_node: MakeGpuNode) -> None:
    node = gpu_node()
    task_id, _ = held(orchestrator, node)
    node.stub.add(f"event 1 {A} 8 13")
    samples(node)
    node.let_go(task_id)
    assert orchestrator.wait_end(task_id)["type"] == "TASK_SUCCEEDED"


def test_a_device_fault_closes_the_slot_until_a_canary_has_computed_well(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node(config=NOTHING_HEAVY)
    (node.home / "canary").write_text("bad")
    task_id, pid = held(orchestrator, node, then="die")
    node.stub.add(f"process {B} {pid} {MIB}")
    samples(node)
    node.stub.add(f"event 1 {B} 8 48")
    samples(node)
    assert node.status() == "RUNNING"
    node.stub.remove(f"process {B}")
    node.let_go(task_id)
    assert orchestrator.wait_end(task_id)["payload"]["error_kind"] == "gpu_fault"
    node.wait_word("DEGRADED")
    reason = node.wait_reason("canary")
    assert reason.startswith(
        f"Xid 48 (uncorrectable double-bit memory error) on {B}; its canary (tests.kit.gpu_runners:canary)"
    )
    assert "exit status 3" in reason
    (node.home / "canary").write_text("good")
    node.wait_word("IDLE")
    ran = (node.home / "canaries").read_text().split("\n")
    assert ran[0] == f"bad {A},{B}"
    assert ran[-2] == f"good {A},{B}"
    assert orchestrator.run("w1", {"taskType": "look"})["type"] == "TASK_SUCCEEDED"


def test_a_gpu_that_falls_off_the_bus_stops_its_task(orchestrator: Orchestrator, gpu_node: MakeGpuNode) -> None:
    node = gpu_node(config="[tasks]\ncancel_grace_s = 0.2\n")
    task_id, _ = held(orchestrator, node)
    node.stub.add(f"fail memory {A} 15", f"fail memory_v1 {A} 15", f"event 1 {A} 8 79")
    end = orchestrator.wait_end(task_id)
    assert end["payload"]["error_kind"] == "gpu_fault"
    assert "fell off the PCIe bus" in end["error"] or "does not answer" in end["error"]
    node.wait_word("DEGRADED")
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


def test_what_another_slots_gpu_says_is_no_answer_of_a_lost_one(
    orchestrator: Orchestrator, gpu_node: MakeGpuNode
) -> None:
    config = "[tasks]\ncancel_grace_s = 0.2\n[node]\nslots = 'per-gpu'\n"
    node = gpu_node(config=config, args=["--set", "gpu.sample_interval_s=1"], worker="w1-gpu0")
    task_id, _ = held(orchestrator, node, "w1-gpu0")
    node.stub.add(f"fail memory {A} 15", f"fail memory_v1 {A} 15")
    assert orchestrator.wait_end(task_id)["payload"]["error_kind"] == "gpu_fault"
    node.wait_word("DEGRADED", "w1-gpu0")
    assert node.status("w1-gpu1") == "IDLE"


def test_a_driver_that_hangs_delays_no_heartbeat_and_no_light_task(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node()
    node.stub.add(f"hang memory {A}", f"hang processes {A}")
    orchestrator.worker_events.clear()
    began = time.monotonic()
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    until(lambda: orchestrator.hear(0.05) or time.monotonic() - began > 7, "7 seconds pass")
    beats = [event for event in orchestrator.worker_events if event["type"] == "HEARTBEAT"]
    assert len(beats) >= 15, "one every 0.3 s, also while the driver hangs"
    assert node.ask(op="status")["heartbeat_late_s"] < 1.0
    node.wait_word("DEGRADED")
    assert "NVML has not answered" in node.reason()
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    node.stub.remove("hang")
    node.wait_word("IDLE")
    assert orchestrator.run("w1", {"taskType": "look"})["type"] == "TASK_SUCCEEDED"


def test_an_adopted_task_is_proven_released_against_what_was_there_before_it(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node()
    task_id, pid = held(orchestrator, node)
    node.stub.change(USED, f"{USED} {20 * GIB}")
    node.stub.add(f"process {A} {pid} {19 * GIB}")
    node.stop(signal.SIGKILL)
    node.start(wait=False)
    node.wait_word("RUNNING")
    samples(node)
    node.stub.remove(f"process {A}")
    node.let_go(task_id)
    used = orchestrator.wait_end(task_id)["payload"]["resources"]
    assert used["gpu_held"] == f"{A} has 19980 MiB more in use than before the task"
    assert used["gpus"][A]["memory_before_bytes"] == 500 * MIB
    node.wait_reason("19980 MiB more in use than when it was idle before")
    node.stub.change(USED, f"{USED} {500 * MIB}")
    node.wait_word("IDLE")


def test_a_supervisor_that_dies_while_gpus_come_back_does_not_forget_them(
    orchestrator: Orchestrator, gpu_node: MakeGpuNode
) -> None:
    node = gpu_node(args=["--set", "gpu.release_timeout_s=1"])
    task_id, _ = held(orchestrator, node)
    node.stub.change(USED, f"{USED} {20 * GIB}")
    node.let_go(task_id)
    until(lambda: {task["state"] for task in node.ask(op="status")["tasks"]} == {"releasing"}, "it is being released")
    node.stop(signal.SIGKILL)
    node.start(wait=False)
    end = orchestrator.wait_end(task_id)
    assert end["type"] == "TASK_SUCCEEDED"
    assert "19980 MiB more" in end["payload"]["resources"]["gpu_held"]
    node.wait_word("DEGRADED")
