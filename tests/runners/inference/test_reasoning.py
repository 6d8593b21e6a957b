"""Reasoning stands apart from the answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runners.api import BadRequest
from tests.kit.batch_files import chat, read, spec_of, write
from tests.kit.inference_specs import spec_of as listed

pytest.importorskip("transformers", reason="needs the extra 'inference'")
from runners.inference.engine import Output
from runners.inference.reasoning import Think
from runners.inference.runner import InferenceRunner
from runners.inference.tokens import Texts

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content and loop.last %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n"
    "{{ '<think>\n' if enable_thinking is not defined or enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def thinking(tiny_llama, tmp_path_factory) -> Path:
    """The tiny model with a template that begins the reasoning."""
    folder = tmp_path_factory.mktemp("models") / "thinking"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["tags are text", "tags are special tokens"])
def texts(reference, request, tiny_llama) -> Texts:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    if "special" in request.param:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return Texts(tokenizer)


def answer(texts: Texts, text: str, reason: Any = "stop") -> Output:
    ids = tuple(texts.tokenizer(text, add_special_tokens=False)["input_ids"])
    return Output(texts.decode_after((), ids), ids, reason)


def unparsed(spec: dict[str, Any]) -> dict[str, Any]:
    """The same task without a parser."""
    options = {name: value for name, value in spec["inference"].items() if name != "reasoning_parser"}
    return {**spec, "inference": options}


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "rest"),
    [
        ("Q: ", "<think>\nwhy\nnot</think>\n\nbecause", "why\nnot", "because"),
        ("Q: ", "\n<think>why</think> because", "why", "because"),
        ("Q: ", "<think></think>because", "", "because"),
        ("Q: ", "<think>why and", "why and", ""),
        ("Q: ", "because", None, "because"),
        ("Q: ", "because, <b>really</b> ", None, "because, <b>really</b> "),
        ("Q: ", "why</think>because", "why", "because"),
        ("Q: <think>\n", "why</think>because", "why", "because"),
        ("Q: <think>\n", "why and", "why and", ""),
        ("Q: <think>\n", "why</think>", "why", ""),
        ("Q: <think>\n\n</think>\n\n", "because", None, "because"),
        ("<think> is a tag. ", "because", None, "because"),
    ],
)
def test_think(texts, prompt, text, reasoning, rest) -> None:
    ids = tuple(texts.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    found = Think(texts)(ids, answer(texts, text))
    assert (found.reasoning, found.text) == (reasoning, rest)


def test_a_stop_string_ends_the_answer_behind_the_reasoning(texts) -> None:
    whole = answer(texts, "<think>why</think>because END")
    cut = Output(whole.text.removesuffix("END"), whole.token_ids, "stop")
    found = Think(texts)((), cut)
    assert (found.reasoning, found.text) == ("why", "because")


def test_a_cut_answer_is_all_reasoning(thinking, make_context) -> None:
    spec = listed(thinking, ["a task"], chat=True, reasoning_parser="think")
    item = InferenceRunner().run(make_context(spec))["items"][0]
    plain = InferenceRunner().run(make_context(unparsed(spec)))["items"][0]
    assert (item["output"], item["finish_reason"]) == ("", "length")
    assert item["reasoning"] == plain["output"].strip() != ""
    assert "reasoning" not in plain


def test_answers_of_batch_files(thinking, make_context, tmp_path) -> None:
    lines = [
        chat("open"),
        chat("hidden", include_reasoning=False, logprobs=True),
        chat("off", reasoning_effort="none"),
        chat("off, by the template's name", chat_template_kwargs={"enable_thinking": False}),
    ]
    spec = spec_of(thinking, write(tmp_path / "b.jsonl", *lines), inference={"reasoning_parser": "think"})
    context = make_context(spec)
    InferenceRunner().run(context)
    choices = {
        line["custom_id"]: line["response"]["body"]["choices"][0]
        for line in read(context.artifacts_dir / "output.jsonl")
    }
    messages = {name: choice["message"] for name, choice in choices.items()}
    assert messages["open"]["reasoning"]
    assert messages["open"]["content"] is None
    assert (messages["hidden"]["reasoning"], messages["hidden"]["content"]) == (None, None)
    assert choices["hidden"]["logprobs"] is None
    assert messages["off"]["reasoning"] is None
    assert messages["off"]["content"]
    assert messages["off"] == messages["off, by the template's name"]


def test_the_template_decides_about_earlier_reasoning(thinking, make_context) -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>secret</think>two", "reasoning": "older"},
        {"role": "user", "content": "three"},
    ]
    last = [*turns[:1], {"role": "assistant", "content": "two", "reasoning_content": "newer"}]
    result = InferenceRunner().run(make_context(listed(thinking, [turns, last], reasoning_parser="think")))
    first, second = (item["metadata"]["rendered_prompt"] for item in result["items"])
    assert "secret" not in first
    assert "older" not in first
    assert "[newer]two" in second


def test_a_parser_of_vllm_needs_vllm(thinking, make_context) -> None:
    with pytest.raises(BadRequest, match=r"inference.reasoning_parser: 'deepseek_r1' is a parser of vLLM.*'think'"):
        InferenceRunner().run(make_context(listed(thinking, ["a"], reasoning_parser="deepseek_r1")))


def test_rows_without_reasoning_are_other_rows(thinking, make_context) -> None:
    spec = listed(thinking, ["a task"], chat=True, reasoning_parser="think", max_tokens=2)
    InferenceRunner().run(make_context(spec))
    result = InferenceRunner().run(make_context(unparsed(spec), anew=False))
    assert "rows" not in result
    assert "reasoning" not in result["items"][0]
