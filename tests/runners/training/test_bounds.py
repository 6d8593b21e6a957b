"""Rows that the model cannot read: too many tokens for its positions, tokens without an embedding. One clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.kit.training_tasks import refused

ROWS: dict[str, Any] = {
    "sft": lambda text: {"prompts": ["a", text]},
    "reward": lambda text: {"preferences": [_pair("a"), _pair(text)]},
    "dpo": lambda text: {"preferences": [_pair("a"), _pair(text)]},
    "kto": lambda text: {"examples": [_example("a"), _example(text)]},
    "grpo": lambda text: {"prompts": ["a", text]},
    "ppo": lambda text: {"prompts": ["a", text]},
}


def _pair(text: str) -> dict[str, str]:
    return {"prompt": text, "chosen": " yes", "rejected": " no"}


def _example(text: str) -> dict[str, Any]:
    return {"prompt": text, "completion": " yes", "label": True}


def spec(folder: Path, task_type: str, text: str) -> dict[str, Any]:
    rewarded = {"reward": "length"} if task_type in ("grpo", "ppo") else {}
    training = {"max_steps": 1, "batch_size": 8, "max_seq_length": 256, "save_model": False}
    return {
        "model": {"source": {"identifier": str(folder)}},
        "data": ROWS[task_type](text),
        "training": training,
        **rewarded,
    }


@pytest.mark.parametrize("task_type", ROWS)
def test_tokens_without_an_embedding(tiny_llama: Path, tmp_path: Path, task_type: str) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tokenizer.save_pretrained(tmp_path / "more")
    message = refused(tmp_path, task_type, spec(tmp_path / "more", task_type, "the <|new|> node"))
    assert "[1]: token '<|new|>' has id" in message


@pytest.mark.parametrize("task_type", ROWS)
def test_longer_than_the_positions(tiny_llama: Path, tmp_path: Path, task_type: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"vocab_size": len(tokenizer), "n_positions": 160, "n_embd": 32, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**size, **ids)).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    message = refused(tmp_path, task_type, spec(tmp_path / "short", task_type, "the node returns " * 60))
    assert "[1]: has" in message
    assert "tokens, and the model has 160 positions" in message
