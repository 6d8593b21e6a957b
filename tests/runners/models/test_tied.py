"""A checkpoint whose output layer differs from the embeddings that its configuration ties it to."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")

from runners.models.tied import other_head
from tests.kit.odd_models import small_config, variant, write


def test_an_output_layer_besides_tied_embeddings(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    def found(folder: Path) -> str | None:
        return other_head(folder, AutoConfig.from_pretrained(folder))

    assert found(tiny_llama) is None
    assert found(variant(tiny_llama, tmp_path / "other", tie_word_embeddings=True)) == "lm_head.weight"
    tied = write(LlamaForCausalLM, tmp_path / "tied", small_config(512, tie_word_embeddings=True))
    assert found(tied) is None
    both = variant(tied, tmp_path / "both", lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()})
    assert found(both) is None
    LlamaForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    config = AutoConfig.from_pretrained(tmp_path / "sharded")
    config.tie_word_embeddings = True
    assert other_head(tmp_path / "sharded", config) == "lm_head.weight"
