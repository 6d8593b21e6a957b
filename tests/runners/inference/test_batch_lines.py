"""What a line of a batch file may say, read without a model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runners.inference.openai.bodies import Defaults
from runners.inference.openai.lines import LineFault, read_line
from runners.inference.openai.requests import Asked, Reader
from tests.kit.batch_files import chat, completion


def read(line: dict[str, Any] | bytes, defaults: Defaults | None = None) -> Asked:
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    reader = Reader(("tiny", "alias"), {"lora": "digest"}, defaults or Defaults(), "identity", None)
    return reader.read(read_line(data))


@pytest.mark.parametrize(
    ("line", "param", "words"),
    [
        (b"{", None, "not JSON"),
        (b'{"custom_id": "\xff"}', None, "not JSON"),
        (b"[" * 100_000, None, "not JSON"),
        (b"[]", None, "expected an object"),
        ({**chat("a"), "custom_id": None}, "custom_id", "custom_id"),
        ({**chat("a"), "custom_id": 7}, "custom_id", "custom_id"),
        ({**chat("a"), "method": "GET"}, "method", "expected 'POST' (found 'GET')"),
        ({**chat("a"), "url": "/v1/audio"}, "url", "/v1/chat/completions, /v1/completions"),
        ({**chat("a"), "url": "/v1/embeddings"}, "url", "cannot embed"),
        ({**chat("a"), "body": []}, "body", "expected an object"),
        (chat("a", model="gpt-9"), "model", "served_model_name"),
        (chat("a", stream=True), "stream", "leave it out"),
        (chat("a", tools=[{"type": "function"}]), "tools", "agent"),
        (chat("a", min_p=0.1), "min_p", "not supported here"),
        (chat("a", temperatur=1), "temperatur", "did you mean 'temperature'"),
        (chat("a", temperature="hot"), "temperature", "body.temperature"),
        (chat("a", temperature=-1), "temperature", "body.temperature"),
        (chat("a", messages=[]), "messages", "body.messages"),
        (chat("a", messages=None), "messages", "body.messages"),
        (chat("a", n=2), "n", "greedy"),
        (chat("a", top_logprobs=2), "top_logprobs", "logprobs: true"),
        (chat("a", top_logprobs=21, logprobs=True), "top_logprobs", "body.top_logprobs"),
        (chat("a", stop=""), "stop", "empty string"),
        (chat("a", logit_bias={"x": 1}), "logit_bias.x", "token id"),
        (chat("a", response_format={"type": "grammar"}), "response_format", "json_schema"),
        (chat("a", response_format={"type": "json_schema"}), "response_format", "schema: expected an object"),
        (completion("a", logprobs=True), "logprobs", "body.logprobs"),
        (completion("a", echo=True), "echo", "not supported here"),
        (completion("a", prompt=None), "prompt", "body.prompt"),
        (completion("a", max_tokens=0), "max_tokens", "body.max_tokens"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_served(line, param, words) -> None:
    with pytest.raises(LineFault) as caught:
        read(line)
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "store": True},
        {"stream": False, "min_p": 0.0, "echo": None, "tools": [], "n": 1, "stop": None, "best_of": None},
        {"response_format": {"type": "text"}, "parallel_tool_calls": True},
    ],
)
def test_fields_that_ask_for_nothing(fields) -> None:
    assert read(chat("a", **fields)).key == read(chat("b")).key


def test_defaults_are_openais_then_the_models_then_the_tasks() -> None:
    bare = chat("a", temperature=None, max_tokens=None)
    plain = read(bare).sampling
    assert (plain.temperature, plain.top_p, plain.top_k, plain.max_tokens) == (1.0, 1.0, 0, 2**31 - 1)
    assert read(completion("a", max_tokens=None)).sampling.max_tokens == 16
    model = {"temperature": 0.6, "top_k": 20, "max_tokens": 99}
    own = read(bare, Defaults({"top_k": 5}, model)).sampling
    assert (own.temperature, own.top_k, own.max_tokens) == (0.6, 5, 99)
    assert read(completion("a", max_tokens=None), Defaults({}, model)).sampling.max_tokens == 16
    assert read(completion("a", max_tokens=None), Defaults({"max_tokens": 7}, model)).sampling.max_tokens == 7
    assert read(chat("a", temperature=0.1), Defaults({"temperature": 1.5}, model)).sampling.temperature == 0.1
    assert read(chat("a", max_completion_tokens=3)).sampling.max_tokens == 3


def test_a_line_may_name_an_adapter_or_another_name() -> None:
    assert (read(chat("a", model="lora")).adapter, read(chat("a", model="lora")).model) == ("lora", "lora")
    assert (read(chat("a", model="alias")).adapter, read(chat("a", model="alias")).model) == (None, "tiny")


def test_the_key_is_of_what_is_asked() -> None:
    same = {read(each).key for each in (chat("a"), chat("b"), chat("a", model="alias"))}
    assert len(same) == 1
    other = (chat("a", "b"), chat("a", seed=1), chat("a", model="lora"), chat("a", logprobs=True),
             chat("a", chat_template_kwargs={"x": 1}), completion("a"))  # fmt: skip
    assert len({read(each).key for each in other} | same) == len(other) + 1
