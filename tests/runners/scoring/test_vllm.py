"""The task type `score` on vLLM: the scores and order of sentence-transformers, one start for all cases."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here"),
]
pytest.importorskip("sentence_transformers", reason="needs the extra 'rag'")


def test_scores_on_vllm_are_those_of_sentence_transformers(forked, make_context, tmp_path) -> None:
    from sentence_transformers import CrossEncoder

    from tests.kit.tiny_encoders import WORDS, write_cross_encoder

    folder = write_cross_encoder(tmp_path / "model", hidden_size=64)
    query, documents = "rain falls on the hill", [*(" ".join(WORDS[i : i + 5]) for i in range(6)), " ".join(WORDS * 3)]
    spec = {"query": query, "documents": documents, "score": {"model": str(folder)}, "engine": "vllm"}
    result = forked(make_context(spec, task_type="score"))
    theirs = CrossEncoder(str(folder), device="cpu").rank(query, documents, show_progress_bar=False)
    ours = result["items"][0]["results"]
    assert [each["index"] for each in ours] == [each["corpus_id"] for each in theirs]
    np.testing.assert_allclose([each["score"] for each in ours], [each["score"] for each in theirs], atol=1e-5)
    assert (result["score"]["engine"], result["score"]["activation"]) == ("vllm", "sigmoid")
    assert result["truncated"] == {"count": 1, "items": [0]}
