"""A checkpoint is loaded only where it holds the model's weights; the limits of a model are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaModel,
)

from runners.api import BadRequest
from runners.models.limits import check_length, check_token_ids, embedding_rows, positions
from runners.models.sources import Source
from runners.models.weights import check_checkpoint, check_finite, first_not_finite, load_model
from tests.kit.odd_models import (
    renamed,
    scaled,
    small_config,
    variant,
    without,
    write,
)

CAUSAL, SCORE, BODY = AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModel
BERT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models by name."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "llama").symlink_to(tiny_llama)
    rows = AutoModelForCausalLM.from_pretrained(tiny_llama).config.vocab_size
    write(LlamaForCausalLM, folder / "tied", small_config(rows, tie_word_embeddings=True))
    write(LlamaForSequenceClassification, folder / "reward", small_config(rows, num_labels=1))
    tied = small_config(rows, num_labels=1, tie_word_embeddings=True)
    write(LlamaForSequenceClassification, folder / "tied-reward", tied)
    write(GPT2LMHeadModel, folder / "gpt2", GPT2Config(vocab_size=rows, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    write(BertForSequenceClassification, folder / "bert", BertConfig(vocab_size=rows, num_labels=3, **BERT))
    write(BertForMaskedLM, folder / "masked-bert", BertConfig(vocab_size=rows, **BERT))
    for prefix in ("_orig_mod.", "module.", "base_model.model."):
        variant(tiny_llama, folder / prefix.rstrip("."), renamed(prefix))
    variant(tiny_llama, folder / "three-layers", num_hidden_layers=3)
    variant(tiny_llama, folder / "one-layer", num_hidden_layers=1)
    variant(tiny_llama, folder / "next-token-layer", num_hidden_layers=1, num_nextn_predict_layers=1)
    variant(tiny_llama, folder / "no-head", without("lm_head"))
    variant(tiny_llama, folder / "narrow", intermediate_size=128)
    variant(tiny_llama, folder / "nan", scaled("layers.1.mlp.down", float("nan")))
    variant(tiny_llama, folder / "infinite", scaled("layers.1.mlp.down", 1e38 * 1e38))
    variant(folder / "reward", folder / "reward-no-score", without("score"))
    variant(
        tiny_llama,
        folder / "old-buffers",
        lambda w: {**w, "model.layers.0.self_attn.rotary_emb.inv_freq": w["model.norm.weight"].clone()},
    )
    return folder


def source_of(models: Path, name: str) -> Source:
    return Source(path=str(models / name), revision=None, shown=name, where="spec.x")


@pytest.mark.parametrize("load", [load_model, check_checkpoint])
@pytest.mark.parametrize(
    ("name", "loader", "head"),
    [
        ("llama", CAUSAL, "whole"),
        ("tied", CAUSAL, "whole"),
        ("gpt2", CAUSAL, "whole"),
        ("old-buffers", CAUSAL, "whole"),
        ("next-token-layer", CAUSAL, "whole"),
        ("reward", SCORE, "whole"),
        ("bert", SCORE, "whole"),
        ("llama", SCORE, "fresh"),
        ("tied", SCORE, "fresh"),
        ("gpt2", SCORE, "fresh"),
        ("reward", SCORE, "fresh"),
        ("llama", BODY, "none"),
        ("gpt2", BODY, "none"),
        ("bert", BODY, "none"),
        ("masked-bert", BODY, "none"),
    ],
)
def test_whole_checkpoints_load(models: Path, load: Any, name: str, loader: Any, head: Any) -> None:
    labels = {"num_labels": 1} if head == "fresh" else {}
    load(loader, source_of(models, name), head=head, **labels)


@pytest.mark.parametrize("load", [load_model, check_checkpoint])
@pytest.mark.parametrize(
    ("name", "loader", "head", "message"),
    [
        (
            "_orig_mod",
            CAUSAL,
            "whole",
            r"21 missing, first 'lm_head\.weight'; 21 unexpected, first '_orig_mod\.lm_.*torch\.compile",
        ),
        ("module", CAUSAL, "whole", r"21 missing, .*first 'module\.lm_head\.weight'.*DataParallel"),
        ("base_model.model", CAUSAL, "whole", r"21 missing, .*PEFT"),
        ("three-layers", CAUSAL, "whole", r"9 missing, first 'model\.layers\.2\.input_layernorm\.weight'"),
        ("one-layer", CAUSAL, "whole", r"9 unexpected, first 'model\.layers\.1\.input_layernorm\.weight'"),
        ("no-head", CAUSAL, "whole", r"1 missing, first 'lm_head\.weight'"),
        ("narrow", CAUSAL, "whole", r"'model\.layers\.0\.mlp\.down_proj\.weight' has shape 128×256 and not 128×128"),
        (
            "reward",
            CAUSAL,
            "whole",
            r"1 missing, first 'lm_head.*1 unexpected, first 'score.*LlamaForSequenceClassification",
        ),
        ("tied-reward", CAUSAL, "whole", r"1 unexpected, first 'score\.weight'.*LlamaForSequenceClassification"),
        ("bert", CAUSAL, "whole", r"missing, first 'cls\.predictions\.bias'.*BertForSequenceClassification"),
        ("masked-bert", CAUSAL, "whole", r"is a BertForMaskedLM, which does not generate text"),
        ("reward-no-score", SCORE, "whole", r"1 missing, first 'score\.weight'"),
        ("reward-no-score", SCORE, "fresh", r"1 missing, first 'score\.weight'"),
        ("llama", SCORE, "whole", r"1 missing, first 'score\.weight'"),
        ("_orig_mod", SCORE, "fresh", r"20 missing, first 'model\.embed_tokens.*torch\.compile"),
        ("three-layers", SCORE, "fresh", r"9 missing"),
        ("one-layer", SCORE, "fresh", r"9 unexpected, first 'model\.layers\.1"),
        ("bert", SCORE, "fresh", r"'classifier\.bias' has shape 3 and not 1"),
        ("_orig_mod", BODY, "none", r"20 missing, first 'embed_tokens\.weight'"),
        ("one-layer", BODY, "none", r"9 unexpected, first 'model\.layers\.1"),
    ],
)
def test_other_checkpoints_are_refused(
    models: Path, load: Any, *, name: str, loader: Any, head: Any, message: str
) -> None:
    labels = {"num_labels": 1} if head == "fresh" else {}
    with pytest.raises(BadRequest, match=rf"^spec\.x: '{name}' .*{message}") as caught:
        load(loader, source_of(models, name), head=head, **labels)
    assert "\n" not in str(caught.value)


def test_a_model_with_an_adapter_beside_it(models: Path, tmp_path: Path) -> None:
    folder = variant(models / "llama", tmp_path / "both")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(BadRequest, match=r"^spec\.x: 'both' holds a model and an adapter"):
        load_model(CAUSAL, source_of(tmp_path, "both"))


def test_a_check_reads_no_weights(models: Path) -> None:
    """What the weights hold is seen only when they are loaded."""
    check_checkpoint(CAUSAL, source_of(models, "nan"))
    model = load_model(CAUSAL, source_of(models, "llama"))
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", ["nan", "infinite"])
def test_weights_that_are_not_finite(models: Path, name: str) -> None:
    source = source_of(models, name)
    with pytest.raises(BadRequest, match=r"no finite numbers in float32: its weight 'model\.layers\.1\.mlp\.down_proj"):
        check_finite(load_model(CAUSAL, source), source)
    check_finite(load_model(CAUSAL, source_of(models, "llama")), source)


def test_weights_too_large_for_their_dtype(models: Path, tmp_path: Path) -> None:
    variant(models / "llama", tmp_path / "large", scaled("layers.0.mlp.up", 1e6))
    source = source_of(tmp_path, "large")
    assert first_not_finite(load_model(CAUSAL, source)) is None
    with pytest.raises(BadRequest, match=r"float16: its weight 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        check_finite(load_model(CAUSAL, source, dtype=torch.float16), source)


def test_positions(models: Path, tmp_path: Path) -> None:
    assert positions(load_model(CAUSAL, source_of(models, "gpt2"))) == 64
    assert positions(load_model(BODY, source_of(models, "bert"), head="none")) == 64
    roberta = RobertaModel(RobertaConfig(vocab_size=300, pad_token_id=1, **BERT))
    count = positions(roberta)
    assert count is not None
    roberta(torch.full((1, count), 7))
    with pytest.raises((IndexError, RuntimeError), match="out of "):
        roberta(torch.full((1, count + 1), 7))
    check_length(count, roberta, "row 3")
    with pytest.raises(BadRequest, match=r"^row 3: has 63 tokens, and the model has 62 positions"):
        check_length(count + 1, roberta, "row 3")


def test_tokens_without_embeddings(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "llama")
    model = load_model(CAUSAL, source_of(models, "llama"))
    rows = embedding_rows(model)
    assert rows == len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    check_token_ids(tokenizer("a task")["input_ids"], rows, tokenizer, "row 1")
    with pytest.raises(BadRequest, match=rf"^row 1: token '<\|new\|>' has id {rows}, and the model has embeddings for"):
        check_token_ids(tokenizer("a <|new|>")["input_ids"], rows, tokenizer, "row 1")
    with pytest.raises(BadRequest, match=r"^row 1: token None has id -1"):
        check_token_ids([-1], rows, tokenizer, "row 1")
