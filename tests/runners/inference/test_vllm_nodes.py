"""One engine of vLLM over two members on this machine: the first answers, the other computes, and both end together."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowmesh.messages.nodes import Gang
from runners.api import RunnerError
from tests.kit.inference_specs import outputs, spec_of
from tests.kit.support import free_port, until
from tests.kit.vllm_zygote import Started, Zygote

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here"),
]
START_S = 300.0
"""Bound on a start of two engines on a busy machine."""
PROMPTS = ["a task starts", "what does a slot share?", "the node"]


def members(forked: Zygote, make_context: Any, model: Path) -> list[Started]:
    spec = spec_of(model, PROMPTS, "vllm", max_tokens=8)
    spec["model"]["vllm"] = {"dtype": "float32"}
    port, started = free_port(), []
    for rank in (1, 0):
        gang = Gang(task_id="whole", rank=rank, size=2, host="127.0.0.1", port=port, rdzv_id=f"whole.{port}")
        started.append(forked.start(make_context({**spec, "nodes": 2}, task_id=f"member-{rank}", gang=gang)))
    return started


def test_two_members_answer_as_one(forked: Zygote, make_context: Any, tiny_llama: Path) -> None:
    other, first = members(forked, make_context, tiny_llama)
    result = first.result(START_S)
    assert other.result() == {"ok": True, "rank": 1, "size": 2}
    spec = spec_of(tiny_llama, PROMPTS, "transformers", max_tokens=8)
    assert outputs(result) == outputs(forked(make_context(spec, task_id="alone")))


def test_a_member_that_is_killed_fails_the_other(forked: Zygote, make_context: Any, tiny_llama: Path) -> None:
    other, first = members(forked, make_context, tiny_llama)
    until((first.answer.parent / "phase-load").exists, "the first one loads", START_S)
    until(lambda: psutil.Process(other.pid).children(), "the other one has joined, and starts its workers", START_S)
    os.kill(other.pid, signal.SIGKILL)
    with pytest.raises(RunnerError, match="member 1 is gone"):
        first.result(START_S)
