"""Tiny models of sentence-transformers on a random BERT: encoders with pooling, and cross-encoders with a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = (
    "rain", "falls", "on", "the", "green", "hill", "while", "a", "cat", "reads", "about", "trains", "and", "tides",
    "in", "autumn",
)  # fmt: skip


def write_encoder(folder: Path, *, positions: int = 64, prompts: dict[str, str] | None = None) -> Path:
    """Write a model of 16 dimensions: mean pooling, unit length, 48 tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    _write_bert(folder / "bert", labels=1, head=False, positions=positions)
    body = Transformer(str(folder / "bert"), max_seq_length=48)
    modules = [body, Pooling(body.get_embedding_dimension(), "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save(str(folder / "model"))
    return folder / "model"


def write_cross_encoder(
    folder: Path, *, labels: int = 1, head: bool = True, positions: int = 32, hidden_size: int = 16
) -> Path:
    """Write a cross-encoder.

    Args:
        head: False: only the body, as of a model that was never made to score.
        positions: tokens that it takes.
        hidden_size: vLLM's attention needs heads of 32, which are half of it.
    """
    _write_bert(folder, labels=labels, head=head, positions=positions, hidden_size=hidden_size)
    return folder


def _write_bert(folder: Path, *, labels: int, head: bool, positions: int, hidden_size: int = 16) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    torch.manual_seed(3)
    folder.mkdir(parents=True)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(names))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=positions)
    config = BertConfig(
        vocab_size=len(names), hidden_size=hidden_size, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=positions, num_labels=labels, initializer_range=0.5,
        pad_token_id=0,
    )  # fmt: skip
    model: Any = BertForSequenceClassification(config)
    (model if head else model.bert).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
