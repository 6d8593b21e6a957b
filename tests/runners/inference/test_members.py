"""How the members of an engine over several nodes keep together, without an engine."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from flowmesh.messages.nodes import Gang
from runners.api import BadRequest, Context
from runners.inference.members import Gone, Over, Start, follow, lead
from runners.inference.task import read_document
from runners.inference.vllm_args import Work, tensor_parallel
from tests.kit.support import free_port

START = Start(port=1, work=Work(prompts=3, prompt_bytes=9, new_tokens=8, copies=1), seed=5)
GPUS = ("GPU-0", "GPU-1", "GPU-2", "GPU-3")
OVER, LOST, NOTHING, WRONG = range(4)
"""Exit statuses of a follower."""


def gang(rank: int, port: int = 1, size: int = 2) -> Gang:
    return Gang(task_id="whole", rank=rank, size=size, host="127.0.0.1", port=port, rdzv_id="whole.1")


def follower(ctx: Context, of: Gang) -> int:
    """A process that follows; returns its pid."""
    if pid := os.fork():
        return pid
    status = WRONG
    try:
        with follow(ctx, of) as found:
            start = found.start(ctx)
            if start is None:
                status = NOTHING
            elif start == START:
                with found.until_over(ctx):
                    time.sleep(60)
    except Over:
        status = OVER
    except Gone:
        status = LOST
    finally:
        os._exit(status)


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def place(make_context: Callable[..., Context]) -> tuple[Context, Gang]:
    of = gang(0, free_port())
    return make_context({}, gang=of), of


def test_members_start_alike_and_end_with_the_first(place: tuple[Context, Gang]) -> None:
    ctx, of = place
    stranger = follower(ctx, msgspec.structs.replace(of, rank=1, rdzv_id="whole.0"))
    pid = follower(ctx, msgspec.structs.replace(of, rank=1))
    with lead(ctx, of) as members:
        members.announce(START)
        with members.watched():
            pass
    assert (status(stranger), status(pid)) == (LOST, OVER)
    pid = follower(ctx, msgspec.structs.replace(of, rank=1))
    with lead(ctx, of):
        pass  # nothing is left to answer
    assert status(pid) == NOTHING


def test_each_side_notices_the_end_of_the_other(place: tuple[Context, Gang]) -> None:
    ctx, of = place
    pid = follower(ctx, msgspec.structs.replace(of, rank=1))
    with lead(ctx, of) as members:
        members.announce(START)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Gone, match="member 1 is gone"), members.watched():
            time.sleep(60)
    assert status(pid) == -signal.SIGKILL
    pid = follower(ctx, msgspec.structs.replace(of, rank=1))
    with contextlib.suppress(ZeroDivisionError), lead(ctx, of) as members:
        members.announce(START)
        raise ZeroDivisionError
    assert status(pid) == LOST


@pytest.mark.parametrize(("gpus", "asked", "found"), [(4, None, 8), (3, None, 4), (0, None, 2), (0, 2, 2), (4, 4, 4)])
def test_a_model_is_spread_over_all_members(make_context: Any, gpus: int, asked: int | None, found: int) -> None:
    ctx = make_context({}, gang=gang(0), gpus=GPUS[:gpus])
    assert tensor_parallel(ctx, {} if asked is None else {"tensor_parallel_size": asked}, heads(8)) == found


@pytest.mark.parametrize(
    ("asked", "count", "message"),
    [
        (3, 8, "tensor_parallel_size: 3 does not divide by 2 nodes"),
        (16, 32, "needs 16 GPUs; this task has 4 GPUs on each of 2 nodes"),
        (None, 7, "spec.nodes: the model's 7 attention heads"),
    ],
)
def test_a_model_that_cannot_be_spread(make_context: Any, asked: int | None, count: int, message: str) -> None:
    ctx = make_context({}, gang=gang(0), gpus=GPUS)
    with pytest.raises(BadRequest, match=message):
        tensor_parallel(ctx, {} if asked is None else {"tensor_parallel_size": asked}, heads(count))


def heads(count: int) -> SimpleNamespace:
    return SimpleNamespace(num_attention_heads=count, num_key_value_heads=count)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine": "transformers"}, "spec.engine: only vLLM runs"),
        ({"enforce_cpu": True}, "spec.enforce_cpu: only vLLM runs"),
        ({"model": {"vllm": {"nnodes": 2}}}, "spec.model.vllm.nnodes: spec.nodes sets it"),
        (
            {"model": {"adapters": [{"type": "lora", "path": "/no/a"}]}},
            "spec.model.adapters: do not go with spec.nodes",
        ),
        ({"data": {"type": "openai_batch", "path": "/no/b"}}, "spec.nodes: a batch file is answered on one node"),
    ],
)
def test_what_does_not_go_with_several_nodes(make_context: Any, fields: dict[str, Any], message: str) -> None:
    model = {"source": {"identifier": "builtin:tiny-llama"}, **fields.pop("model", {})}
    spec = {"nodes": 2, "data": {"type": "list", "items": ["a"]}, **fields, "model": model}
    with pytest.raises(BadRequest, match=message):
        read_document(make_context(spec), spec, "spec")
