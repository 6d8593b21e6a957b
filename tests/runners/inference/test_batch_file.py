"""Batch files of OpenAI's API on Transformers: every line has its answer or its error. `vllm run-batch` is compared in
test_vllm_batch.py."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from runners.api import BadRequest, Cancelled
from tests.kit.batch_files import chat, completion, read, spec_of, without_ids, write
from tests.kit.inference_specs import outputs
from tests.kit.inference_specs import spec_of as listed

pytest.importorskip("transformers", reason="needs the extra 'inference'")
from runners.inference.openai import generate as batch
from runners.inference.runner import InferenceRunner
from runners.inference.transformers_engine import TransformersEngine

LINES = [
    chat("long", max_tokens=12),
    completion("stopped", ["a task", "the node"], stop=["the"], max_tokens=20),
    chat("drawn", temperature=0.9, seed=7, n=2),
    "{not JSON",
    chat("other", model="gpt-9"),
    completion("logprobs", logprobs=2, max_tokens=3),
    chat("long"),
]


@pytest.fixture
def run(tiny_llama, make_context, tmp_path):
    """Runs a batch file; returns the result, the lines of output.jsonl and those of errors.jsonl."""

    def do(*lines: Any, context: dict[str, Any] | None = None, **fields: Any) -> Any:
        file = write(tmp_path / "batch.jsonl", *lines)
        made = make_context(spec_of(tiny_llama, file, **fields), **(context or {}))
        folder = made.artifacts_dir
        result = InferenceRunner().run(made)
        return result, read(folder / "output.jsonl"), read(folder / "errors.jsonl")

    return do


def test_every_line_has_its_answer_or_its_error(run, tiny_llama, make_context) -> None:
    result, answers, errors = run(*LINES)
    assert [line["custom_id"] for line in answers] == ["long", "stopped", "drawn", "logprobs"]
    assert [(line["custom_id"], line["error"]["error"]["param"]) for line in errors] == [
        (None, None), ("other", "model"), ("long", "custom_id"),
    ]  # fmt: skip
    assert [line["error"]["error"]["message"].partition(":")[0] for line in errors] == [
        f"spec.data.path line {number}" for number in (4, 5, 7)
    ]
    assert result["request_counts"] == {"total": 7, "completed": 4, "failed": 3}
    bodies = {line["custom_id"]: line["response"]["body"] for line in answers}
    assert bodies["long"]["usage"]["completion_tokens"] == 12
    assert [len(body["choices"]) for body in bodies.values()] == [1, 2, 2, 1]
    stopped = bodies["stopped"]["choices"]
    plain = InferenceRunner().run(make_context(listed(tiny_llama, ["a task", "the node"], stop=["the"], max_tokens=20)))
    assert [choice["text"] for choice in stopped] == outputs(plain), "not what the same prompts give as a list"
    assert {choice["stop_reason"] for choice in stopped if choice["finish_reason"] == "stop"} <= {"the"}
    drawn = [choice["message"]["content"] for choice in bodies["drawn"]["choices"]]
    assert drawn[0] != drawn[1]
    logprobs = bodies["logprobs"]["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == bodies["logprobs"]["choices"][0]["text"]
    assert all(
        token == next(iter(top)) for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
    )
    total = sum(body["usage"]["total_tokens"] for body in bodies.values())
    assert result["usage"]["total_tokens"] == total


def test_a_cancelled_batch_goes_on(run, make_context, monkeypatch, tiny_llama, tmp_path) -> None:
    """Also where the lines stand in another order, under other ids, in a compressed file, some at a time."""
    monkeypatch.setattr("runners.inference.loader.CPU_ROWS", 2)
    lines = [chat(f"line {number}", f"a task {number}") for number in range(8)]
    whole = {line["custom_id"]: without_ids(line["response"]) for line in run(*lines, context={"task_id": "w"})[1]}
    file = write(tmp_path / "batch.jsonl", *lines)
    first = make_context(spec_of(tiny_llama, file))
    report = first.progress

    def progress(at: float, *rest: Any, **metrics: float) -> None:
        if at >= 3:
            raise Cancelled
        report(at, *rest, **metrics)

    monkeypatch.setattr(first, "progress", progress)
    with pytest.raises(Cancelled):
        InferenceRunner().run(first)
    kept = read(first.artifacts_dir / "output.jsonl")
    assert 3 <= len(kept) < 8, "what is finished is not in output.jsonl"

    asked: list[int] = []
    generate = TransformersEngine.generate
    monkeypatch.setattr(batch, "WINDOW_LINES", 2)
    monkeypatch.setattr(
        TransformersEngine, "generate",
        lambda self, requests, *rest: asked.append(len(requests)) or generate(self, requests, *rest),
    )  # fmt: skip
    renamed = [{**line, "custom_id": f"again {line['custom_id']}"} for line in reversed(lines)]
    packed = tmp_path / "batch.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, renamed)).encode()))
    second = make_context(spec_of(tiny_llama, packed), anew=False)
    result = InferenceRunner().run(second)
    assert result["rows"]["reused"] == len(kept)
    assert sum(asked) == 8 - len(kept)
    assert max(asked) <= 2, "more lines at once than a window holds"
    answers = read(second.artifacts_dir / "output.jsonl")
    assert [line["custom_id"] for line in answers] == [line["custom_id"] for line in renamed]
    assert {line["custom_id"].removeprefix("again "): without_ids(line["response"]) for line in answers} == whole


def test_a_task_that_answers_nothing_fails(run, tmp_path) -> None:
    with pytest.raises(BadRequest, match=r"no line can be served; .* line 1: body.model: 'gpt-9'"):
        run(chat("a", model="gpt-9"), chat("b", stream=True))
    assert len(read(tmp_path / "results" / "task-1" / "artifacts" / "errors.jsonl")) == 2
    with pytest.raises(BadRequest, match=r"no line can be served; .* 2048 with the answer; shorten it"):
        run(chat("a", "word " * 3000))
    with pytest.raises(BadRequest, match=r"spec\.data\.path line 1: not a line of a batch file.*data.type jsonl"):
        run('{"question": "why?"}')
    with pytest.raises(BadRequest, match="holds no line"):
        run("", " ")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"inference": {"n": 2, "system_prompt": "x"}}, r"inference.n: .* Also .*inference.system_prompt"),
        ({"postprocess": {"jsonl_export": {}}}, "spec.postprocess"),
    ],
)
def test_fields_that_each_line_says_are_refused(run, fields, named) -> None:
    with pytest.raises(BadRequest, match=named):
        run(chat("a"), **fields)


def test_what_lines_leave_out_is_the_tasks(run) -> None:
    given = {"max_tokens": 3, "temperature": 0, "logit_bias": {"200": 100}}
    lines = [chat("task's", max_tokens=None, temperature=None), chat("own", max_tokens=2, logit_bias={"201": 100})]
    _, answers, _ = run(*lines, inference=given)
    first, second = (line["response"]["body"] for line in answers)
    assert (first["usage"]["completion_tokens"], second["usage"]["completion_tokens"]) == (3, 2)
    assert first["choices"][0]["message"]["content"] != second["choices"][0]["message"]["content"]


def test_a_shard_has_its_lines(run) -> None:
    lines = [chat(f"{number}", max_tokens=1) for number in range(5)]
    result, answers, _ = run(*lines, shard={"index": 1, "total": 2, "contiguous": False})
    assert [line["custom_id"] for line in answers] == ["1", "3"]
    assert result["request_counts"]["total"] == 2


def test_lines_of_different_sampling_share_batches(run, monkeypatch) -> None:
    """And no line's answer depends on those beside it."""
    kinds = [
        {}, {"temperature": 0.7, "seed": 3}, {"stop": ["the"]}, {"frequency_penalty": 1.0}, {"logit_bias": {"200": 3}},
        {"logprobs": True, "top_logprobs": 2}, {"bad_words": ["returns"], "min_tokens": 3}, {"ignore_eos": True},
        {"temperature": 1.2, "top_k": 5, "seed": 9, "n": 2},
    ]  # fmt: skip
    lines = [
        chat(f"{number}", f"{'a task ' * (number % 5)}ends", max_tokens=4 + number % 4, **kinds[number % len(kinds)])
        for number in range(45)
    ]
    rows: list[int] = []
    generate = TransformersEngine._generate
    monkeypatch.setattr(
        TransformersEngine, "_generate",
        lambda self, requests, work: rows.append(len(requests)) or generate(self, requests, work),
    )  # fmt: skip
    _, answers, _ = run(*lines)
    assert (sum(rows), len(rows)) == (50, 3), "answers of up to 4, and of up to 8 tokens; 32 rows a batch"
    monkeypatch.setattr("runners.inference.loader.CPU_ROWS", 1)
    _, alone, _ = run(*lines[: len(kinds)])
    beside = [without_ids(line) for line in answers[: len(kinds)]]
    assert [texts_of(line) for line in beside] == [texts_of(without_ids(line)) for line in alone]


def texts_of(line: dict[str, Any]) -> list[Any]:
    choices = line["response"]["body"]["choices"]
    return [(choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) for choice in choices]
