"""What of an embedding model differs between an index and its queries, and what its files do not say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("faiss", reason="needs the extra 'rag'")
pytest.importorskip("sentence_transformers", reason="needs the extra 'rag'")

from tests.kit.rag_tasks import rag, refusal
from tests.kit.tiny_encoders import WORDS, write_encoder

TEXTS = [" ".join(WORDS[i : i + 4]) for i in range(8)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_encoder(tmp_path / "encoder")


@pytest.fixture
def index(model: Path, make_context: Any) -> str:
    documents = {"documents": {"type": "list", "items": TEXTS}, "save": True}
    built = rag(make_context, {"faiss": documents, "embedding": {"model": str(model)}}, task_id="built")
    return str(built["faiss"]["index_path"])


def test_a_model_that_was_trained_again_at_its_place(model: Path, index: str, make_context: Any) -> None:
    """It has its name still; its vectors are not those of the index."""
    import torch
    from safetensors.torch import load_file, save_file

    query = {"faiss": {"index": index}, "query": TEXTS[3], "search": {"top_k": 1}}
    found = rag(make_context, query)["queries"][0]["items"][0]
    assert found["payload"]["text"] == TEXTS[3]
    file = next(model.rglob("model.safetensors"))
    torch.manual_seed(5)
    weights = {name: torch.randn_like(weight) for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    message = refusal(make_context, query)
    assert f"the vectors of {str(model)!r} are not those of the index, which was built with other files of" in message
    assert message.endswith("build it again")


def test_the_same_model_at_another_place(
    model: Path, index: str, make_context: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(model, moved := model.parent / "moved")
    found = rag(make_context, {"faiss": {"index": index}, "query": TEXTS[3], "embedding": {"model": str(moved)}})
    assert found["queries"][0]["items"][0]["payload"]["text"] == TEXTS[3]
    assert "the index was built with" not in caplog.text


def test_a_prompt_for_documents_that_are_embedded_already(
    index: str, make_context: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rag(make_context, {"faiss": {"index": index}, "query": "a cat", "embedding": {"document_prompt": "about "}})
    assert "spec.embedding.document_prompt: without effect, because the documents are embedded already" in caplog.text


def test_a_language_model_as_embedder(tiny_llama: Path, make_context: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The library makes its pooling up, and embeds each text as a chat's message, whose tokens count as well."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, limit = (each.from_pretrained(tiny_llama) for each in (AutoTokenizer, AutoConfig))
    limit = limit.max_position_embeddings
    long = tokenizer.decode(tokenizer("a task " * limit)["input_ids"][1 : limit - 2])
    assert limit - 3 <= len(tokenizer(long)["input_ids"]) <= limit, "by itself it would fit"
    documents = {"documents": {"type": "list", "items": TEXTS}}
    found = rag(make_context, {"faiss": documents, "query": long, "embedding": {"model": str(tiny_llama)}})
    assert (
        "has no modules.json, so its vectors are what sentence-transformers assumes (lasttoken pooling)" in caplog.text
    )
    assert "as a chat's message" in caplog.text
    assert found["queries"][0]["truncated"]
