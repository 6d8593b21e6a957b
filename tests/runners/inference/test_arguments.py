"""Decisions that need no model: batches, vLLM's arguments, agreement; as pure functions."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runners.api import BadRequest, RunnerError
from runners.inference import engines
from runners.inference.batches import Need, cache_bytes_per_token, plan
from runners.inference.task import read_task
from runners.inference.vllm_args import (
    CONTEXT_BYTES,
    CPU_LEAST_BYTES,
    Work,
    check_names,
    cpu_cache_bytes,
    divides,
    fit_utilization,
    lora_rank,
    tensor_parallel,
    utilization,
)
from runners.models.sources import Source
from tests.kit.inference_specs import spec_of

GIB = 2**30


@given(
    lengths=st.lists(st.integers(1, 500), max_size=60),
    copies=st.integers(1, 4),
    new_tokens=st.integers(1, 300),
    batch_tokens=st.integers(1, 20_000),
    batch_rows=st.integers(1, 70),
    max_positions=st.one_of(st.none(), st.integers(1, 600)),
)
def test_batches_hold_every_row_once_and_fit(*, lengths, copies, new_tokens, batch_tokens, batch_rows, max_positions):
    batches = plan(
        [Need(request, length, new_tokens, copies) for request, length in enumerate(lengths)],
        max_positions=max_positions,
        batch_tokens=batch_tokens,
        batch_rows=batch_rows,
    )
    rows = [(row.request, row.copy) for batch in batches for row in batch]
    assert sorted(rows) == [(request, copy) for request in range(len(lengths)) for copy in range(copies)]
    widths = [[lengths[row.request] for row in batch] for batch in batches]
    for width in widths:
        assert len(width) <= batch_rows
        row_tokens = max(width) + new_tokens
        row_tokens = row_tokens if max_positions is None else min(row_tokens, max_positions)
        assert len(width) == 1 or len(width) * row_tokens <= batch_tokens
        if max_positions is not None and max(width) > min(width):
            assert max(width) + min(new_tokens, max_positions - min(width)) <= max_positions, "none goes on past it"
    flat = [length for width in widths for length in width]
    assert flat == sorted(flat, reverse=True)


def test_the_cache_of_a_token() -> None:
    llama = SimpleNamespace(
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, hidden_size=4096, num_hidden_layers=32
    )
    assert cache_bytes_per_token(llama, 2) == 128 * 1024
    assert cache_bytes_per_token(SimpleNamespace(num_attention_heads=4, hidden_size=64, num_hidden_layers=1), 4) == 512


@pytest.mark.parametrize(
    ("asked", "memory", "share"),
    [
        (0.9, [(79 * GIB, 80 * GIB)], 0.9),
        (0.9, [(79 * GIB, 80 * GIB), (40 * GIB, 80 * GIB)], 39.5 / 80),
        (0.9, [(22 * GIB, 24 * GIB)], 21.5 / 24),
        (0.3, [(40 * GIB, 80 * GIB)], 0.3),
        (0.9, [(0, 80 * GIB)], 0.0),
        (0.9, [], 0.9),
    ],
)
def test_the_share_of_a_gpu_is_what_is_free(asked: float, memory: list[Any], share: float) -> None:
    assert fit_utilization(asked, memory, CONTEXT_BYTES) == pytest.approx(share, abs=0.001)


@pytest.mark.parametrize("asked", [0, 1.5, "most", True, -0.1])
def test_a_share_that_is_none(make_context, asked: Any) -> None:
    with pytest.raises(BadRequest, match=r"spec\.model\.vllm\.gpu_memory_utilization: expected a share"):
        utilization(make_context({}), {"gpu_memory_utilization": asked})


def model(heads: int, kv_heads: int) -> Any:
    return SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads)


@pytest.mark.parametrize(
    ("gpus", "count", "heads", "kv_heads", "size"),
    [
        (8, None, 32, 8, 8),
        (8, 4, 32, 8, 4),
        (8, "2", 32, 8, 2),
        (3, None, 32, 8, 2),
        (6, None, 12, 2, 6),
        (8, None, 14, 2, 2),
        (4, None, 32, 1, 4),
        (1, None, 32, 8, 1),
        (0, None, 32, 8, 1),
    ],
)
def test_tensor_parallel_by_gpus_and_heads(make_context, *, gpus, count, heads, kv_heads, size) -> None:
    spec = {} if count is None else {"resources": {"hardware": {"gpu": {"count": count}}}}
    context = make_context(spec, gpus=tuple(f"GPU-{i}" for i in range(gpus)))
    assert tensor_parallel(context, {}, model(heads, kv_heads)) == size
    assert divides(model(heads, kv_heads), size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 4}, r"tensor_parallel_size: 4 × pipeline 1 needs 4 GPUs; this task has 3 GPUs"),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, r"tensor_parallel_size: 2 × pipeline 2 needs 4"),
        ({"tensor_parallel_size": 3}, r"tensor_parallel_size: the model's 32 attention heads \(8 for keys\) do not"),
        ({"tensor_parallel_size": "2"}, r"tensor_parallel_size: expected a number of GPUs >= 1 \(found '2'\)"),
        ({"pipeline_parallel_size": True}, r"pipeline_parallel_size: expected a number of GPUs"),
    ],
)
def test_tensor_parallel_that_cannot_be(make_context, options: dict[str, Any], message: str) -> None:
    context = make_context({}, gpus=("GPU-0", "GPU-1", "GPU-2"))
    with pytest.raises(BadRequest, match=r"^spec\.model\.vllm\." + message):
        tensor_parallel(context, options, model(32, 8))


def test_arguments_that_are_not_the_tasks() -> None:
    known = ["model", "seed", "max_num_seqs"]
    check_names({"max_num_seqs": 1}, known)
    with pytest.raises(
        BadRequest, match=r"spec\.model\.vllm\.seed: not for the task to set; set spec\.inference\.seed"
    ):
        check_names({"seed": 1}, known)
    with pytest.raises(BadRequest, match=r"max_num_seq: unknown engine argument; did you mean 'max_num_seqs'"):
        check_names({"max_num_seq": 1}, known)


def test_the_cpus_cache_is_what_the_work_needs_within_a_share() -> None:
    small = Work(prompts=1, prompt_bytes=10, new_tokens=5, copies=1)
    large = Work(prompts=10**6, prompt_bytes=10**9, new_tokens=500, copies=1)
    assert cpu_cache_bytes(small, 1024, 100 * GIB) == CPU_LEAST_BYTES
    assert cpu_cache_bytes(large, 100_000, 8 * GIB) == 2 * GIB
    assert large.steps > small.steps == 5


def test_lora_ranks() -> None:
    assert [lora_rank(rank) for rank in (1, 8, 9, 100, 512)] == [8, 8, 16, 128, 512]
    with pytest.raises(BadRequest, match=r"rank 513; vLLM takes 512"):
        lora_rank(513)


TRACEBACK = """(EngineCore pid=7) ERROR 11-27 00:21:43 [core.py:1510] Traceback (most recent call last):
(Worker_TP1 pid=9) ERROR 11-27 00:21:43 [mp.py:9] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.
(EngineCore pid=7) ERROR 11-27 00:21:43 [core.py:1510] Exception: WorkerProc failed. See stack trace for root cause.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_what_an_engine_process_told_the_log_is_the_tasks_line(tmp_path) -> None:
    from runners.inference.engine import GpuOutOfMemory
    from runners.inference.vllm_failures import Logs, start_failure, step_failure

    told = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    source = Source(path="m", revision=None, shown="m", where="spec.model.source.identifier")
    before, log = os.dup(1), os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        os.dup2(log, 1)
        os.write(1, b"ValueError: an older one\n")
        logs = Logs()
        silent = start_failure(told, source, logs)
        os.write(1, TRACEBACK.encode())
        failures = start_failure(told, source, logs), step_failure(told, logs)
        other = start_failure(ValueError("no such thing"), source, logs)
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(log)
    assert type(silent) is RunnerError
    assert [type(each) for each in failures] == [GpuOutOfMemory] * 2
    assert "'m' does not fit: CUDA out of memory. Tried to allocate 2 GiB." in str(failures[0])
    assert type(other) is BadRequest


def test_a_process_with_threads_is_not_forked_by_vllm(make_context, monkeypatch) -> None:
    pytest.importorskip("torch", reason="needs the extra 'inference'")
    from runners.inference.vllm_engine import set_environment

    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        set_environment(make_context({}, gpus=("GPU-0", "GPU-1")), alone=True, eager=False)
        assert "VLLM_WORKER_MULTIPROC_METHOD" not in os.environ
        set_environment(make_context({}, gpus=("GPU-0", "GPU-1")), alone=False, eager=False)
    finally:
        done.set()
        thread.join()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_a_process_in_which_cuda_was_started_is_not_forked_by_vllm(make_context, monkeypatch) -> None:
    """Torch starts it to count the GPUs, where one of the machine is lost."""
    torch = pytest.importorskip("torch", reason="needs the extra 'inference'")
    from runners.inference import vllm_engine

    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    opened: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: opened.append("/dev/nvidia-uvm") or 2)
    monkeypatch.setattr(vllm_engine, "cuda_started", lambda: bool(opened))
    vllm_engine.set_environment(make_context({}, gpus=("GPU-0", "GPU-1")), alone=False, eager=False)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_a_slice_of_a_gpu_is_no_place_for_vllm_by_itself(make_context, monkeypatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _name: object())
    chosen = {}
    for gpu in ("GPU-0", "MIG-0"):
        context = make_context(spec_of("m", ["a"], engine="auto"), gpus=(gpu,))
        chosen[gpu] = engines.choose(context, read_task(context, context.spec))
    assert chosen == {"GPU-0": "vllm", "MIG-0": "transformers"}
    context = make_context(spec_of("m", ["a"], engine="vllm"), gpus=("MIG-0",))
    assert engines.choose(context, read_task(context, context.spec)) == "vllm"
