"""Streamed text and what models write besides it, from real tokenizers and Transformers' own parser."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from transformers import AutoTokenizer
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS

from runners.inference.tokens import Texts
from runners.serve.calls import Message, Piece
from runners.serve.growing import Growing

QWEN: dict[str, Any] = next(each for names, each in _RESPONSE_TEMPLATE_FALLBACKS.items() if "qwen3" in names)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_parts_of_any_tokens_make_up_the_text_without_cut_characters(tiny_llama: Path) -> None:
    texts = Texts(AutoTokenizer.from_pretrained(tiny_llama))
    draw = random.Random(1)
    written = [
        texts.tokenizer(each, add_special_tokens=False)["input_ids"] for each in ("größer 漢字 👩‍👧", " a b", "\n\n")
    ]
    for _ in range(200):
        prompt = draw.choices(range(len(texts.tokenizer)), k=draw.randint(1, 12))
        tokens: list[int] = []
        for _ in range(draw.randint(1, 6)):
            tokens += draw.choice([*written, draw.choices(range(len(texts.tokenizer)), k=3)])
        growing = Growing(texts, prompt, ())
        parts = [growing.add(tokens[:count]) for count in range(1, len(tokens) + 1)]
        whole = texts.decode_after(texts.visible(prompt), tokens).rstrip("\ufffd")
        assert "".join(parts) + growing.rest(whole) == whole


def test_what_may_begin_a_stop_string_waits(tiny_llama: Path) -> None:
    texts = Texts(AutoTokenizer.from_pretrained(tiny_llama))
    tokens = texts.tokenizer("one END two ENDED", add_special_tokens=False)["input_ids"]
    growing = Growing(texts, (1,), ("ENDED", "D t"))
    sent = "".join(growing.add(tokens[:count]) for count in range(1, len(tokens)))  # the last one ends the answer
    assert sent == "one END two "
    assert growing.rest("one END two ") == ""


def read(text: str, size: int, **options: Any) -> tuple[str, str, list[dict[str, Any]]]:
    message = Message(QWEN, "<|im_start|>assistant\n", options.pop("tools", [TOOL]), **options)
    pieces = [message.add(text[at : at + size]) for at in range(0, len(text), size)] + [message.end()]
    calls = [call for each in pieces for call in each.calls]
    assert all(isinstance(each, Piece) for each in pieces)
    return "".join(each.content for each in pieces), "".join(each.reasoning for each in pieces), calls


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_reasoning_and_calls_are_taken_out(size: int) -> None:
    content, reasoning, calls = read(f"<think>\nhm\n</think>\n\nI add.\n{CALL}\n{CALL}", size)
    assert content.strip() == "I add."
    assert reasoning.strip() == "hm"
    assert [(each["index"], each["function"]) for each in calls] == [
        (number, {"name": "add", "arguments": '{"a":1}'}) for number in range(2)
    ]
    assert len(read(f"{CALL}\n{CALL}", size, one_call=True)[2]) == 1


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_that_cannot_be_read_or_were_not_offered_stay_text(size: int) -> None:
    content, _, calls = read('I add.\n<tool_call>\n{"name": "add", "argu</tool_call> and so on', size)
    assert not calls
    assert content.startswith("I add.")
    assert '{"name": "add", "argu' in content
    assert content.endswith("and so on")
    content, _, calls = read('<tool_call>\n{"name": "add", "argu', size)
    assert not calls
    assert '{"name": "add", "argu' in content
    content, _, calls = read(f"I add.\n{CALL}", size, tools=[])
    assert not calls
    assert content == f"I add.\n{CALL}"
