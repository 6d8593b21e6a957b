"""A batch file on vLLM: the same lines, field by field, as `vllm run-batch` writes, ids and times aside."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.kit.batch_files import chat, completion, read, spec_of, without_ids, write
from tests.kit.paths import PERMITS, ROOT

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here"),
]
PARSER = "deepseek_v3"
"""Takes reasoning out of the chats whose template arguments say `thinking`."""


@pytest.fixture(scope="module")
def thinking(tiny_llama, tmp_path_factory) -> Path:
    """The tiny model with tokens for <think> and </think>."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "thinking"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<think>", "</think>"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines(model: Path) -> list[dict[str, Any]]:
    name = str(model)
    parts = [{"type": "text", "text": "the node"}, {"type": "text", "text": "ends"}]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    open_turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a node"}]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    thought = {"chat_template_kwargs": {"thinking": True}, "max_tokens": 12}
    return [
        chat("plain", model=name),
        chat("no model", max_tokens=20),
        chat("stop", stop=["the"], max_tokens=40),
        chat("stop id", stop_token_ids=[200], logit_bias={"200": 100}),
        chat("end", logit_bias={"2": 100}),
        chat("no end", ignore_eos=True, min_tokens=4, logit_bias={"2": 100}),
        chat("half a character", logit_bias={"100": 50}),
        chat("logprobs", logprobs=True, top_logprobs=3, max_tokens=5),
        chat("no alternatives", logprobs=True, max_tokens=3),
        chat("several", n=2, temperature=0.8, seed=4, logprobs=True, top_logprobs=2),
        chat("drawn", temperature=1.0, seed=7, top_p=0.9, top_k=20),
        chat("penalties", frequency_penalty=1.5, presence_penalty=0.5, repetition_penalty=1.2, max_tokens=16),
        chat("parts", messages=turns),
        chat("continued", messages=open_turn, continue_final_message=True, add_generation_prompt=False),
        chat("json", response_format={"type": "json_object"}, max_tokens=12),
        chat("schema", response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}),
        chat("no limit", max_tokens=None, stop=["node"]),
        chat("limit", max_completion_tokens=6),
        chat("thought", **thought, logit_bias={"389": 4}),
        chat("only thought", **thought),
        chat("hidden thought", **thought, logit_bias={"389": 4}, include_reasoning=False, logprobs=True),
        chat("other model", model="gpt-9"),
        chat("too long", "word " * 3000),
        chat("greedy", n=2),
    ]  # fmt: skip


COMPLETIONS = [
    completion("two", ["a task", "the node"], logprobs=2, max_tokens=5),
    completion("ids", [50, 60, 70], stop=["the"], max_tokens=30),
    completion("default", max_tokens=None, temperature=0.7, seed=3, n=2),
]
REFUSED = ["other model", "too long", "greedy"]


@pytest.fixture(scope="module")
def theirs(thinking, tmp_path_factory) -> dict[str, Any]:
    """What vLLM answers, by custom_id: whole lines of run-batch, and bodies of its server for completions."""
    folder = tmp_path_factory.mktemp("run-batch")
    file = write(folder / "chats.jsonl", *lines(thinking))
    (folder / "bodies.jsonl").write_text("".join(f"{json.dumps(line['body'])}\n" for line in COMPLETIONS))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kit.vllm_batch", "bodies.jsonl", "answers.jsonl",
         "-i", str(file), "-o", "out.jsonl",
         "--model", str(thinking), "--dtype", "float32", "--enforce-eager", "--reasoning-parser", PARSER],
        env=env, cwd=folder, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = {line["custom_id"]: line for line in read(folder / "out.jsonl")}
    answers = read(folder / "answers.jsonl")
    return {**found, **{line["custom_id"]: body for line, body in zip(COMPLETIONS, answers, strict=True)}}


def test_the_same_lines_as_run_batch(theirs, thinking, forked, make_context, tmp_path) -> None:
    bad = chat(
        "refused by its grammar", response_format={"type": "json_schema", "json_schema": {"schema": {"type": 7}}}
    )
    file = write(tmp_path / "batch.jsonl", *lines(thinking), *COMPLETIONS, bad)
    spec = spec_of(thinking, file, "vllm", inference={"reasoning_parser": PARSER})
    context = make_context(spec, permits=msgspec.structs.replace(PERMITS, reasoning_parsers=("deepseek_*",)))
    result = forked(context)
    ours = {line["custom_id"]: line for line in read(context.artifacts_dir / "output.jsonl")}
    for name, line in ours.items():
        expected, found = theirs[name], line if "response" in theirs[name] else line["response"]["body"]
        assert without_ids(found) == approximately(without_ids(expected)), name
    errors = {line["custom_id"]: line for line in read(context.artifacts_dir / "errors.jsonl")}
    assert sorted(errors) == sorted([*REFUSED, bad["custom_id"]])
    for name in REFUSED:
        for field in ("type", "code"):
            assert errors[name]["error"]["error"][field] == theirs[name]["error"]["error"][field], name
        assert errors[name]["response"]["status_code"] == theirs[name]["response"]["status_code"], name
    assert errors[bad["custom_id"]]["error"]["error"]["param"] == "response_format"
    assert result["request_counts"]["failed"] == 4
    thought = ours["thought"]["response"]["body"]["choices"][0]["message"]
    assert thought["reasoning"], "the case shows nothing"
    assert thought["content"], "the case shows nothing"


def approximately(value: Any) -> Any:
    """The same with floats that may differ in their last digits."""
    if isinstance(value, dict):
        return {name: approximately(each) for name, each in value.items()}
    if isinstance(value, list):
        return [approximately(each) for each in value]
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value


def test_the_operator_says_which_parsers(thinking, forked, make_context, tmp_path) -> None:
    spec = spec_of(thinking, write(tmp_path / "b.jsonl", chat("a")), "vllm", inference={"reasoning_parser": PARSER})
    with pytest.raises(Exception, match=r"tasks.reasoning_parsers does not list 'deepseek_v3'; 'think' needs no"):
        forked(make_context(spec))
