"""Slots on a real node: what each worker registers, which devices its tasks get, and that slots run in parallel."""

from __future__ import annotations

import os
import signal

import pytest

from tests.kit.gpu_node import (
    CONFIG,
    GIB,
    MIB,
    TWO_GPUS,
    A,
    B,
    MakeGpuNode,
    held,
)
from tests.kit.support import Node, Orchestrator, until

pytestmark = pytest.mark.redis


def test_one_slot_registers_all_gpus_and_a_task_sees_them_by_uuid(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node()
    gpus = node.hardware()["gpu"]
    assert gpus == {
        "driver_version": "580.65",
        "cuda_version": "13.0",
        "gpus": [
            {"index": 0, "name": "NVIDIA H100", "uuid": A, "memory_total_bytes": 80 * GIB},
            {"index": 1, "name": "NVIDIA H100", "uuid": B, "memory_total_bytes": 80 * GIB},
        ],
    }
    result = node.result(orchestrator.run("w1", {"taskType": "look"})["task_id"])
    assert (result["gpus"], result["visible"]) == ([A, B], f"{A},{B}")
    capped = {"taskType": "look", "resources": {"hardware": {"gpu": {"count": 1}}}}
    assert node.result(orchestrator.run("w1", capped)["task_id"])["visible"] == A
    capped["resources"]["hardware"]["gpu"]["count"] = 0  # type: ignore[index]
    end = orchestrator.run("w1", capped)
    assert node.result(end["task_id"])["visible"] == ""
    assert "gpus" not in end["payload"]["resources"]

    beat = orchestrator.wait_worker_event("HEARTBEAT")
    orchestrator.worker_events.clear()
    beat = orchestrator.wait_worker_event("HEARTBEAT")
    assert beat["metrics"]["power"]["gpu_watts"]["total"] == 300.0


def test_the_nodes_own_visible_devices_are_all_that_it_offers(gpu_node: MakeGpuNode) -> None:
    node = gpu_node(env={"CUDA_VISIBLE_DEVICES": "1"})
    assert [gpu["uuid"] for gpu in node.hardware()["gpu"]["gpus"]] == [B]


def test_a_visible_device_that_there_is_not_ends_the_node_with_the_reason(gpu_node: MakeGpuNode) -> None:
    node = gpu_node(env={"CUDA_VISIBLE_DEVICES": "7"}, wait=None)
    assert node.process is not None
    assert node.process.wait(30) == 78
    assert "CUDA_VISIBLE_DEVICES: '7' matches no GPU; this node has: 0 GPU-aaaa, 1 GPU-bbbb" in node.text()


def test_a_gpu_that_is_down_leaves_the_node_the_others(orchestrator: Orchestrator, gpu_node: MakeGpuNode) -> None:
    """And is registered when it is back, while a task runs on."""
    node = gpu_node(script=f"{TWO_GPUS}\nfail handle {A} 15\n")
    assert [gpu["uuid"] for gpu in node.hardware()["gpu"]["gpus"]] == [B]
    (fault,) = node.ask(op="status")["faults"]
    assert (fault["workers"], fault["reason"]) == ([], "GPU 0: GPU is lost")
    task_id, pid = held(orchestrator, node)
    node.stub.remove(f"fail handle {A}")
    until(lambda: len(node.hardware()["gpu"]["gpus"]) == 2, "both are registered")
    assert node.task_pid(task_id) == pid
    node.let_go(task_id)
    assert orchestrator.wait_end(task_id)["type"] == "TASK_SUCCEEDED"
    assert node.ask(op="status")["faults"] == []


@pytest.mark.parametrize("how", ["CUDA_VISIBLE_DEVICES", "slots"])
def test_a_worker_whose_gpus_are_named_and_not_there_is_degraded_until_they_are(
    orchestrator: Orchestrator, gpu_node: MakeGpuNode, how: str
) -> None:
    lost = f"{TWO_GPUS}\nfail handle {A} 15\n"
    if how == "slots":
        slots = "[[slots]]\nname = 'a'\ngpus = [0]\n[[slots]]\nname = 'b'\ngpus = [1]\n"
        node = gpu_node(script=lost, config=slots, worker="w1-b")
        worker = "w1-a"
    else:
        node = gpu_node(script=lost, env={"CUDA_VISIBLE_DEVICES": "0,1"}, wait=None)
        worker = "w1"
    node.wait_word("DEGRADED", worker)
    assert "name GPU 0, which is not there; GPU 0: GPU is lost" in node.reason(worker)
    waits = orchestrator.dispatch(worker, {"taskType": "look"})
    assert orchestrator.run(worker, {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    assert orchestrator.of_task(waits) == []
    node.stub.remove(f"fail handle {A}")
    end = orchestrator.wait_end(waits)
    assert A in node.result(end["task_id"])["gpus"]
    node.wait_word("IDLE", worker)


def test_a_driver_that_is_loaded_after_the_start(orchestrator: Orchestrator, gpu_node: MakeGpuNode) -> None:
    node = gpu_node(script=f"init 9\n{TWO_GPUS}", config="[node]\nslots = 'per-gpu'\n")
    assert node.hardware()["gpu"] == {"driver_version": None, "cuda_version": None, "gpus": []}
    assert "the NVIDIA driver is installed and does not work" in node.ask(op="status")["faults"][0]["reason"]
    node.stub.remove("init")
    for worker, uuid in (("w1-gpu0", A), ("w1-gpu1", B)):
        node.wait_word("IDLE", worker)
        assert [gpu["uuid"] for gpu in node.hardware(worker)["gpu"]["gpus"]] == [uuid]
    assert orchestrator.redis.smembers("workers:ids") == {b"w1-gpu0", b"w1-gpu1"}, "w1 is no worker any more"


def test_a_reload_that_names_a_gpu_that_there_is_not_leaves_the_node_as_it_is(
    orchestrator: Orchestrator, gpu_node: MakeGpuNode
) -> None:
    node = gpu_node()
    task_id, pid = held(orchestrator, node)
    kept = "not restarted, the node keeps its version and settings"
    said = f"{kept}: slots[0].gpus[0]: '7' matches no GPU; this node has: 0 GPU-aaaa"
    (node.home / "node.toml").write_text(CONFIG + "[[slots]]\nname = 'a'\ngpus = [7]\n")
    for count, number in enumerate((signal.SIGHUP, signal.SIGUSR2), 1):
        os.kill(node.pid, number)
        until(lambda count=count: node.text().count(said) == count, "the error is logged", 20)
    assert node.task_pid(task_id) == pid
    (node.home / "node.toml").write_text(CONFIG + "[[slots]]\nname = 'a'\ngpus = [1]\n")
    os.kill(node.pid, signal.SIGHUP)
    until(lambda: [gpu["uuid"] for gpu in node.hardware()["gpu"]["gpus"]] == [B], "the other GPU is registered")
    node.let_go(task_id)
    assert orchestrator.wait_end(task_id)["type"] == "TASK_SUCCEEDED"


def test_per_gpu_slots_are_workers_that_run_tasks_at_once(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node(env={"WORKER_COST_PER_HOUR": "4"}, config="[node]\nslots = 'per-gpu'\n", worker="w1-gpu0")
    node.wait_word("IDLE", "w1-gpu1")
    assert orchestrator.redis.smembers("workers:ids") == {b"w1-gpu0", b"w1-gpu1"}
    for worker, uuid in (("w1-gpu0", A), ("w1-gpu1", B)):
        assert [gpu["uuid"] for gpu in node.hardware(worker)["gpu"]["gpus"]] == [uuid]
        assert orchestrator.redis.hget(f"worker:{worker}", "cost_per_hour") == b"2.0"
        assert orchestrator.redis.ttl(f"worker:{worker}:hb") > 0
    first, _ = held(orchestrator, node, "w1-gpu0")
    second, _ = held(orchestrator, node, "w1-gpu1")
    for task_id, uuid in ((first, A), (second, B)):
        node.let_go(task_id)
        end = orchestrator.wait_end(task_id)
        assert node.result(task_id)["visible"] == uuid
        assert list(end["payload"]["resources"]["gpus"]) == [uuid]
        assert end["payload"]["cost_usd"] == pytest.approx(2 / 3600 * end["payload"]["runtime_sec"], abs=1e-8)
    beat = orchestrator.wait_worker_event("HEARTBEAT", worker_id="w1-gpu1")
    assert [gpu["index"] for gpu in beat["metrics"]["power"]["gpu_watts"]["per_gpu"]] == [1]


def test_two_cpu_slots_run_two_tasks_at_once_each_on_its_own_cpus(orchestrator: Orchestrator, make_node) -> None:
    ours = sorted(os.sched_getaffinity(0))
    if len(ours) < 2:
        pytest.skip("needs two CPUs")
    config = f"""
        [environments.bare]
        [task_types.look]
        runner = "tests.kit.gpu_runners:LookRunner"
        environment = "bare"
        [[slots]]
        name = "one"
        cpus = "{ours[0]}"
        [[slots]]
        name = "two"
        cpus = "{ours[1]}"
    """
    node: Node = make_node(config=config, start=False)
    node.start(wait=False)
    tasks = {}
    for name in ("one", "two"):
        orchestrator.wait_worker_event("STATUS", worker_id=f"w1-{name}", status="IDLE")
        tasks[name] = orchestrator.dispatch(f"w1-{name}", {"taskType": "look", "wait": True})
    for name, cpu in (("one", ours[0]), ("two", ours[1])):
        orchestrator.wait_started(tasks[name])
        hardware = orchestrator.redis.hget(f"worker:w1-{name}", "hardware_json")
        assert b'"logical_cores":1' in hardware
        assert orchestrator.redis.hget(f"worker:w1-{name}", "cost_per_hour") == b"0.5"
        assert cpu in os.sched_getaffinity(node.task_pid(tasks[name]))
    for name, cpu in (("one", ours[0]), ("two", ours[1])):
        (node.results_dir / tasks[name] / "go").touch()
        assert orchestrator.wait_end(tasks[name])["type"] == "TASK_SUCCEEDED"
        result = node.result(tasks[name])
        assert (result["cpus"], result["threads"], result["gpus"]) == ([cpu], 1, [])


def test_a_task_tells_what_its_gpus_and_its_processes_used(
    orchestrator: Orchestrator,
    gpu_node: MakeGpuNode,
) -> None:
    node = gpu_node()
    task_id, pid = held(orchestrator, node, burn=True, resources={"hardware": {"gpu": {"count": 1}}})
    node.stub.change(f"set {A} used", f"set {A} used {20 * GIB}")
    node.stub.add(f"set {A} util 80", f"set {A} temp 61", f"set {A} throttle 0x20", f"process {A} {pid} {19 * GIB}")
    node.stub.change(f"set {A} energy", f"set {A} energy 1500000")
    beat = orchestrator.wait_worker_event("HEARTBEAT")
    while "gpu_throttled" not in beat["metrics"]:
        orchestrator.worker_events.clear()
        beat = orchestrator.wait_worker_event("HEARTBEAT")
    assert beat["metrics"]["gpu_throttled"] == {A: ["sw_thermal"]}
    node.stub.remove(f"process {A}")
    node.stub.change(f"set {A} used", f"set {A} used {501 * MIB}")
    node.let_go(task_id)
    payload = orchestrator.wait_end(task_id)["payload"]
    assert payload["energy"]["gpu_joules"] == 500.0
    assert payload["energy"]["kwh"] == pytest.approx(500 / 3.6e6, rel=0.5)
    used = payload["resources"]
    gpu = used["gpus"][A]
    assert (gpu["memory_before_bytes"], gpu["memory_peak_bytes"], gpu["memory_after_bytes"]) == (
        500 * MIB,
        20 * GIB,
        501 * MIB,
    )
    assert (gpu["processes_before"], gpu["processes_after"]) == ([], [])
    assert (gpu["utilization_peak_percent"], gpu["temperature_peak_c"], gpu["throttled"]) == (80, 61, ["sw_thermal"])
    assert used["gpu_release_ms"] >= 0
    assert used["cpu_seconds"] > 0.05
    assert used["peak_rss_bytes"] > 5 * MIB
    result = node.result(task_id)
    assert {name: result[name] for name in ("resources", "energy", "cost_usd")} == {
        name: payload[name] for name in ("resources", "energy", "cost_usd")
    }


def test_a_task_that_runs_on_while_the_slots_are_cut_anew_keeps_its_gpus(
    orchestrator: Orchestrator, gpu_node: MakeGpuNode
) -> None:
    node = gpu_node()
    first, _ = held(orchestrator, node)
    node.stop(signal.SIGKILL)
    node.args += ["--set", "node.slots=per-gpu"]
    node.start(wait=False)
    node.wait_word("DEGRADED", "w1-gpu1")
    assert node.reason("w1-gpu1") == f"task {first} of another worker is still on one of its GPUs"
    node.let_go(first)
    used = orchestrator.wait_end(first)["payload"]["resources"]
    assert sorted(used["gpus"]) == [A, B]
    for worker in ("w1-gpu0", "w1-gpu1"):
        node.wait_word("IDLE", worker)
    assert orchestrator.run("w1-gpu1", {"taskType": "look"})["type"] == "TASK_SUCCEEDED"
