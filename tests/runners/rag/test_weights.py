"""An embedding model that lacks weights, or computes no numbers, is refused; one that is whole is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra 'rag'")
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

from runners.api import BadRequest
from runners.embedding.load import load_embedder
from runners.embedding.options import Embedding
from runners.models.builtin import train_tokenizer
from tests.kit.odd_models import renamed, scaled, variant, write

TEXTS = ["a task starts", "the node waits for a slot"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with its language head, whose body makes embeddings."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(train_tokenizer()), max_position_embeddings=64, pad_token_id=0, **sizes)
    tokenizer = train_tokenizer()
    tokenizer.chat_template = None  # with one, sentence-transformers embeds a chat
    return write(BertForMaskedLM, tmp_path_factory.mktemp("embedding") / "bert", config, tokenizer)


def embedder_of(make_context: Any, folder: Path) -> Any:
    return load_embedder(make_context({}), Embedding(model=str(folder)))


def test_a_whole_model_embeds(whole: Path, make_context) -> None:
    """Though it has a head that is not used, and no pooler, which is not used either."""
    vectors = embedder_of(make_context, whole).embed(make_context({}), TEXTS, "document")
    tokenizer, model = AutoTokenizer.from_pretrained(whole), AutoModel.from_pretrained(whole)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        assert np.allclose(vector, states.mean(dim=1)[0].numpy(), atol=1e-5)


def test_weights_that_are_not_the_models(whole: Path, make_context, tmp_path) -> None:
    variant(whole, tmp_path / "compiled", renamed("_orig_mod."))
    variant(whole, tmp_path / "three", num_hidden_layers=3)
    variant(whole, tmp_path / "one", num_hidden_layers=1)
    for name, message in (
        ("compiled", r"37 missing, .*torch\.compile"),
        ("three", r"16 missing, first 'encoder\.layer\.2\."),
        ("one", r"16 unexpected, first '.*layer\.1\."),
    ):
        with pytest.raises(BadRequest, match=rf"^spec\.embedding\.model: .* a BertModel: {message}"):
            embedder_of(make_context, tmp_path / name)


def test_nan(whole: Path, make_context, tmp_path) -> None:
    variant(whole, tmp_path / "nan", scaled("encoder.layer.1.output.dense.weight", float("nan")))
    embedder = embedder_of(make_context, tmp_path / "nan")
    with pytest.raises(BadRequest, match=r"^spec\.embedding\.model: .*float32: its weight '.*layer\.1\.output\.dense"):
        embedder.embed(make_context({}), TEXTS, "query")


def test_texts_beyond_the_models_limits(whole: Path, make_context, tmp_path, caplog) -> None:
    folder = variant(whole, tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tokenizer.save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 512, "do_lower_case": false}')
    embedder = embedder_of(make_context, folder)
    assert embedder.max_tokens == 64
    assert embedder.embed(make_context({}), ["a task " * 100], "document").shape == (1, 32)
    assert "texts cut for the embedding model" in caplog.text
    with pytest.raises(BadRequest, match=r"^spec\.embedding\.model: token '<\|new\|>' has id \d+, and the model has"):
        embedder.embed(make_context({}), ["a <|new|>"], "query")
