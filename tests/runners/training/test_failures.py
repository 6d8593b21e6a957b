"""What goes wrong while it trains, told in one line with the right fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")

import torch

from flowmesh.messages.job import Fault
from runners.api import Context, RunnerError
from runners.training.faults import explain, is_echo
from runners.training.groups import blame
from runners.training.progress import Meter
from runners.training.ranks import Report
from tests.kit.training_tasks import QUICK, SUMS, refused, run, start

ALLOWED = {"reward_callables": ["tests.kit.training_tasks:*"]}


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    training = {**QUICK, "learning_rate": 1e30, "trainer_args": {"max_grad_norm": 1e30}}
    running = start(tmp_path, "sft", {"data": {"prompts": SUMS}, "training": training})
    outcome = running.wait()
    assert (outcome.ok, outcome.fault) == (False, "error")
    assert "the training diverged; lower spec.training.learning_rate" in outcome.message
    assert not (running.out_dir / "final_model").exists()


def test_a_bad_line_and_a_bad_column_reach_the_author(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    assert refused(tmp_path, "sft", {"data": {"jsonl_path": str(path)}}).startswith("rows.jsonl line 2: not JSON")
    path.write_text('{"question": "why"}\n')
    message = refused(tmp_path, "sft", {"data": {"jsonl": {"path": str(path), "text_field": "body"}}}, task_id="two")
    assert message == "rows.jsonl line 1: no column 'body' (spec.data.jsonl.text_field); there are: 'question'"


@pytest.mark.parametrize("task_type", ["grpo", "ppo"])
def test_rewards_that_are_none(tmp_path: Path, task_type: str) -> None:
    spec = {
        "data": {"prompts": ["a", "b"]},
        "generation": {"max_new_tokens": 4},
        "training": {"steps": 1, "batch_size": 8, "max_seq_length": 32},
    }
    reward = "tests.kit.training_tasks:says_nan"
    outcome = run(tmp_path, task_type, {**spec, "reward": reward}, limits=ALLOWED, task_id="nan")
    assert outcome.fault == "error"
    assert f"reward {reward}: nan for" in outcome.message
    outcome = run(
        tmp_path,
        task_type,
        {**spec, "reward": "tests.kit.training_tasks:runs_out_of_memory"},
        limits=ALLOWED,
        task_id="memory",
    )
    assert outcome.fault == "host_oom"
    message = refused(tmp_path, task_type, {**spec, "reward": reward}, task_id="forbidden")
    assert f"spec.reward.function: this node does not allow '{reward}'" in message


def test_out_of_memory_is_told_apart() -> None:
    with pytest.raises(RuntimeError) as host:
        torch.empty(1 << 60)
    found = explain(host.value, "trained")
    assert found is not None
    assert found.fault is Fault.HOST_OOM
    assert str(found).startswith(
        "out of host memory while it trained: lower spec.training.batch_size or max_seq_length"
    )
    gpu = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), "trained")
    assert gpu is not None
    assert gpu.fault is Fault.GPU_OOM
    bare = explain(MemoryError(), "loaded")
    assert bare is not None
    assert bare.fault is Fault.HOST_OOM
    assert explain(ValueError("something else"), "trained") is None


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_a_rank_without_memory_is_no_echo_of_another(text: str) -> None:
    found = explain(RuntimeError(text), "trained")
    assert found is not None
    assert found.fault is Fault.GPU_OOM
    own = Report(rank=1, ok=False, when=2.0, fault=found.fault, message=str(found))
    echo = Report(
        rank=0, ok=False, when=1.0, fault=Fault.ERROR, message="DistBackendError: NCCL communicator was aborted"
    )
    assert blame([echo, own]) is own


def test_an_overflow_under_loss_scaling_is_no_divergence(make_context: Callable[..., Context]) -> None:
    Meter(make_context({}), scaled=True).log(1, {"loss": 2.0, "grad_norm": float("inf")})
    with pytest.raises(RunnerError, match="loss is nan at step 1"):
        Meter(make_context({}), scaled=True).log(1, {"loss": float("nan")})
    with pytest.raises(RunnerError, match="grad_norm is inf at step 1"):
        Meter(make_context({})).log(1, {"loss": 2.0, "grad_norm": float("inf")})


def test_losing_a_peer_is_nobodys_own_error() -> None:
    assert is_echo("RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    assert not is_echo("ValueError: the column is missing")
