"""Groups of two ranks over gloo: they learn together, and they end together, whatever ends one of them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")

from flowmesh.messages.nodes import Gang
from flowmesh.processes.pipe import Phase, Progress
from tests.kit.support import free_port
from tests.kit.training_tasks import (
    PAIRS,
    QUICK,
    SUMS,
    losses,
    refused,
    run,
    start,
    train,
)
from tests.kit.training_zygote import Running

LONG = {"max_steps": 100_000, "batch_size": 4, "learning_rate": 1e-4, "max_seq_length": 64, "nproc_per_node": 2}
ALLOWED = {"reward_callables": ["tests.kit.training_tasks:*"]}


def ranks_of(running: Running) -> list[psutil.Process]:
    """The processes that the task forked, in the order of their ranks."""
    return sorted(psutil.Process(running.pid).children(), key=lambda process: process.pid)


def training(running: Running) -> list[psutil.Process]:
    """Wait until the ranks are at their first steps."""
    running.wait_for(lambda frame: isinstance(frame, Progress) and frame.done >= 1)
    return ranks_of(running)


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=5)
    return not alive


def test_two_ranks_do_what_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    alone = train(tmp_path, "sft", {"data": {"prompts": SUMS}, "training": QUICK})
    half = {**QUICK, "batch_size": QUICK["batch_size"] // 2, "nproc_per_node": 2}
    running = start(tmp_path, "sft", {"data": {"prompts": SUMS}, "training": half}, task_id="task-2", threads=2)
    outcome = running.wait()
    assert outcome.ok, outcome.message
    together = outcome.result or {}
    assert losses(together) == pytest.approx(losses(alone), rel=1e-3)
    assert losses(together)[-1] < losses(together)[0] / 3
    metrics = together["metrics"]
    assert (metrics["world_size"], metrics["sharding"]) == (2, "ddp")
    assert metrics["samples"] == alone["metrics"]["samples"]
    assert metrics["peak_host_bytes"] > alone["metrics"]["peak_host_bytes"] * 1.5
    for rank in ("0", "1"):
        log = running.out_dir / "logs" / rank
        assert "sharding: ddp" in (log / "stderr.log").read_text()
        assert (log / "stdout.log").is_file()
    assert [archive.folder for archive in outcome.archives] == ["final_model"]
    assert {"fetch", "load", "train", "save"} <= outcome.phases.keys()
    assert [frame.name for frame in running.frames if isinstance(frame, Phase)] == [
        "fetch", "ranks", "load", "train", "save",
    ]  # fmt: skip
    assert [frame.done for frame in running.frames if isinstance(frame, Progress)][-1] == QUICK["max_steps"]


def test_dpo_on_two_ranks_with_an_adapter(tmp_path: Path) -> None:
    settings = {**QUICK, "learning_rate": 2e-2, "batch_size": 4, "nproc_per_node": 2}
    spec = {"data": {"preferences": PAIRS}, "training": settings, "lora": {"r": 4}}
    result = train(tmp_path, "dpo", spec)
    assert losses(result)[-1] < losses(result)[0] / 2
    assert (Path(result["final_lora_path"]) / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("task_type", ["ppo", "grpo"])
def test_online_training_on_two_ranks(tmp_path: Path, task_type: str) -> None:
    spec = {
        "data": {"prompts": ["a task", "the node", "a slot", "an engine"]},
        "reward": {"function": "tests.kit.training_tasks:likes_e"},
        "generation": {"max_new_tokens": 6},
        "training": {"steps": 3, "batch_size": 8, "max_seq_length": 32, "nproc_per_node": 2, "logging_steps": 1},
    }
    result = train(tmp_path, task_type, spec, limits=ALLOWED)
    assert result["metrics"]["samples"] == 3 * 8 * 2
    assert (Path(result["final_model_path"]) / "model.safetensors").is_file()


@pytest.mark.parametrize("task_type", ["ppo", "grpo"])
def test_ranks_write_different_completions_to_the_same_prompt(tmp_path: Path, task_type: str) -> None:
    spec = {
        "data": {"prompts": [{"prompt": "a task", "where": str(tmp_path)}] * 8},
        "reward": {"function": "tests.kit.training_tasks:writes_down"},
        "generation": {"max_new_tokens": 12},
        "training": {"steps": 1, "batch_size": 4, "max_seq_length": 32, "nproc_per_node": 2},
    }
    train(tmp_path, task_type, spec, limits=ALLOWED)
    one, other = (set((tmp_path / f"rank-{rank}").read_text().splitlines()) for rank in range(2))
    assert not one & other


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_group_by_name(tmp_path: Path, rank: int) -> None:
    running = start(tmp_path, "sft", {"data": {"prompts": SUMS}, "training": LONG})
    ranks = training(running)
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[rank].pid, signal.SIGKILL)
    outcome = running.wait(20)
    assert time.monotonic() - began < 10
    assert (outcome.ok, outcome.fault) == (False, "crash")
    assert outcome.message == f"rank {rank} was killed by SIGKILL"
    assert all_gone(ranks)


def test_nothing_of_a_group_outlives_its_parent(tmp_path: Path) -> None:
    running = start(tmp_path, "sft", {"data": {"prompts": SUMS}, "training": LONG})
    ranks = training(running)
    running.kill()
    assert running.ended(5)
    running.pipe.close()
    assert all_gone(ranks)


def test_the_failing_ranks_own_error_is_the_groups(tmp_path: Path) -> None:
    spec = {
        "data": {"prompts": ["a", "b"]},
        "reward": {"function": "tests.kit.training_tasks:fails_on_rank_1"},
        "generation": {"max_new_tokens": 4},
        "training": {"steps": 3, "batch_size": 4, "max_seq_length": 32, "nproc_per_node": 2},
    }
    outcome = run(tmp_path, "ppo", spec, limits=ALLOWED)
    assert (outcome.ok, outcome.fault) == (False, "error")
    assert outcome.message.startswith("rank 1: reward tests.kit.training_tasks:fails_on_rank_1 raised ValueError")
    assert "fails_on_rank_1" in outcome.detail
    assert "Traceback" in outcome.detail


def test_a_rank_that_hangs_is_named_when_the_others_have_waited_long_enough(tmp_path: Path) -> None:
    spec = {
        "data": {"prompts": ["a", "b"]},
        "reward": {"function": "tests.kit.training_tasks:hangs_on_rank_1"},
        "generation": {"max_new_tokens": 4},
        "training": {
            "steps": 3,
            "batch_size": 4,
            "max_seq_length": 32,
            "nproc_per_node": 2,
            "trainer_args": {"ddp_timeout": 5},
        },
    }
    running = start(tmp_path, "ppo", spec, limits=ALLOWED)
    outcome = running.wait(60)
    assert (outcome.ok, outcome.fault) == (False, "error")
    assert outcome.message.startswith("rank 0: ")
    assert "Timed out waiting 5000ms" in outcome.message
    assert "still at work: rank 1 (where, is at the end of its logs/<rank>/stderr.log)" in outcome.message
    assert "in hangs_on_rank_1" in (running.out_dir / "logs" / "1" / "stderr.log").read_text()


def test_memory_and_bad_requests_keep_their_fault(tmp_path: Path) -> None:
    spec = {
        "data": {"prompts": ["a", "b"]},
        "reward": {"function": "tests.kit.training_tasks:runs_out_of_memory"},
        "generation": {"max_new_tokens": 4},
        "training": {"steps": 1, "batch_size": 4, "max_seq_length": 32, "nproc_per_node": 2},
    }
    outcome = run(tmp_path, "ppo", spec, limits=ALLOWED)
    assert outcome.fault == "host_oom"
    assert "out of host memory while it trained: lower spec.training.batch_size" in outcome.message
    bad = {"data": {"prompts": ["a"], "messages": None}, "training": {"nproc_per_node": 2, "trainer_args": {"no": 1}}}
    message = refused(tmp_path, "sft", bad, task_id="bad")
    assert message.startswith("spec.training.trainer_args.no: SFTConfig has no such argument")


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_cancel_stops_all_ranks_at_one_step(tmp_path: Path, checkpoint: bool) -> None:
    running = start(tmp_path, "sft", {"data": {"prompts": SUMS}, "training": LONG})
    ranks = training(running)
    running.cancel(checkpoint=checkpoint)
    outcome = running.wait(20)
    assert (outcome.fault, outcome.message) == ("cancelled", "cancelled by a test")
    assert all_gone(ranks)
    found = [path.name for path in (running.out_dir / "checkpoints").glob("checkpoint-*")]
    if checkpoint:
        assert len(found) == 1
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= {
            path.name for path in (running.out_dir / "checkpoints" / found[0]).iterdir()
        }
    else:
        assert found == []


def test_sigterm_to_the_whole_group_is_a_cancel(tmp_path: Path) -> None:
    running = start(tmp_path, "sft", {"data": {"prompts": SUMS}, "training": LONG})
    ranks = training(running)
    os.killpg(running.pid, signal.SIGTERM)
    outcome = running.wait(10)
    assert outcome.fault == "cancelled"
    assert all_gone(ranks)


def nodes(tmp_path: Path, **more: Any) -> list[Running]:
    settings = {
        **QUICK,
        "max_steps": 4,
        "batch_size": 4,
        "nnodes": 2,
        "rdzv_endpoint": f"127.0.0.1:{free_port()}",
        **more,
    }
    spec = {"data": {"prompts": SUMS}, "training": settings}
    return [start(tmp_path, "sft", spec, task_id=f"node-{i}") for i in range(2)]


@pytest.mark.slow
def test_two_nodes_meet_by_torchrun(tmp_path: Path) -> None:
    both = nodes(tmp_path)
    outcomes = [running.wait(120) for running in both]
    assert all(outcome.ok for outcome in outcomes), [outcome.message for outcome in outcomes]
    results = [outcome.result or {} for outcome in outcomes]
    assert [result["metrics"]["world_size"] for result in results] == [2, 2]
    assert losses(results[0]) == losses(results[1])
    assert losses(results[0])[-1] < losses(results[0])[0]
    leads = ["final_model_path" in result for result in results]
    assert sorted(leads) == [False, True]
    assert (both[leads.index(True)].out_dir / "final_model" / "model.safetensors").is_file()
    for running in both:
        progress = [frame for frame in running.frames if isinstance(frame, Progress)]
        assert progress[-1].done == 4
        assert (running.out_dir / "logs" / "0" / "stderr.log").is_file()


def members(tmp_path: Path, size: int = 2, **more: Any) -> list[Running]:
    """The members of one task on several nodes, which share RESULTS_DIR."""
    port, spec = free_port(), {"data": {"prompts": SUMS}, "training": {**QUICK, "batch_size": 4, **more}}
    started = []
    for rank in range(size):
        gang = Gang(task_id="whole", rank=rank, size=size, host="127.0.0.1", port=port, rdzv_id=f"whole.{port}")
        task_id = "whole" if rank == 0 else f"whole-{rank}"
        started.append(start(tmp_path, "sft", {**spec, "nodes": 2}, task_id=task_id, gang=gang))
    return started


@pytest.mark.slow
def test_members_of_a_gang_train_as_one_and_fewer_continue(tmp_path: Path) -> None:
    both = members(tmp_path, max_steps=4, save_steps=2)
    outcomes = [running.wait(120) for running in both]
    assert all(outcome.ok for outcome in outcomes), [outcome.message for outcome in outcomes]
    first, second = (outcome.result or {} for outcome in outcomes)
    assert first["metrics"]["world_size"] == 2
    assert second.pop("metrics")["steps"] == 4
    assert second == {"ok": True, "rank": 1, "size": 2}
    assert (both[0].out_dir / "final_model" / "model.safetensors").is_file()
    kept = both[0].out_dir / "checkpoints" / "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in kept.iterdir()}
    assert not (both[1].out_dir / "checkpoints").exists()
    (alone,) = members(tmp_path, 1, max_steps=6, save_steps=2)
    outcome = alone.wait()
    assert outcome.ok, outcome.message
    assert outcome.result is not None
    assert (outcome.result["metrics"]["first_step"], outcome.result["metrics"]["world_size"]) == (4, 1)


@pytest.mark.slow
def test_a_node_that_is_killed_leaves_no_rank(tmp_path: Path) -> None:
    both = members(tmp_path, max_steps=100_000)
    for running in both:
        running.wait_for(lambda frame: isinstance(frame, Progress) and frame.done >= 1, 90)
    trees = [psutil.Process(running.pid).children(recursive=True) for running in both]
    assert all(len(tree) >= 2 for tree in trees)  # torchrun, and its rank
    both[0].kill()
    assert both[0].ended(5)
    both[0].pipe.close()
    assert all_gone(trees[0])
    outcome = both[1].wait(60)
    assert outcome.fault == "crash", outcome.message
    assert all_gone(trees[1])
