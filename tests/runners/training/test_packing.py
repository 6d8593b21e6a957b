"""Packing: refused where a packed row reads the row before it; where it is not, the loss is that of the rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from runners.api import BadRequest
from runners.training import packing
from tests.kit.training_tasks import refused, train

TEXTS = ["the node starts", "a slot ends"]


def opt(vocabulary: int = 64) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 32}
    more = {"word_embed_proj_dim": 32, "max_position_embeddings": 128, "dropout": 0.0, "init_std": 0.2}
    return OPTForCausalLM(OPTConfig(vocab_size=vocabulary, **sizes, **more))


def losses(model: Any) -> tuple[float, float]:
    """Of two rows: packed as TRL's collator does, and alone, each weighed by its tokens."""
    rows = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(12)
    labels = rows.clone()
    labels[:, 0] = -100
    model.eval()
    with torch.no_grad():
        packed = model(
            input_ids=rows.reshape(1, -1),
            position_ids=positions.repeat(2)[None],
            labels=labels.reshape(1, -1),
            use_cache=False,
        ).loss
        alone = [model(input_ids=row[None], labels=label[None]).loss for row, label in zip(rows, labels, strict=True)]
    return float(packed), float(sum(alone) / 2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_the_probe_agrees_with_the_losses(kind: str) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **small)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=1)
        ),
        "opt": opt,
    }[kind]()
    packed, alone = losses(model)
    if packed == pytest.approx(alone, abs=1e-4):
        packing.check(model)
    else:
        with pytest.raises(BadRequest, match=r"spec\.training\.packing: in a \w+ with \w+ attention"):
            packing.check(model)


def test_packing_is_refused_before_a_step(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    opt(len(tokenizer)).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    training = {"max_steps": 1, "batch_size": 1, "packing": True, "max_seq_length": 64, "save_model": False}
    spec = {"model": {"source": {"identifier": str(tmp_path / "opt")}}, "data": {"prompts": TEXTS}}
    message = refused(tmp_path, "sft", {**spec, "training": training})
    assert "spec.training.packing: in a OPTForCausalLM with sdpa attention" in message


def test_where_it_works_the_loss_is_that_of_the_rows(tiny_llama: Path, tmp_path: Path) -> None:
    training = {"max_steps": 1, "batch_size": 1, "packing": True, "max_seq_length": 64, "save_model": False}
    spec = {"model": {"source": {"identifier": str(tiny_llama)}}, "data": {"prompts": TEXTS}}
    result = train(tmp_path, "sft", {**spec, "training": {**training, "logging_steps": 1}})
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        total, count = total + float(loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert result["metrics"]["final_loss"] == pytest.approx(total / count, abs=1e-3)
