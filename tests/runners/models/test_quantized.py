"""A quantized checkpoint holds all weights of its model, under the names of its quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")

from runners.api import BadRequest
from runners.models.sources import Source
from runners.models.weights import check_checkpoint
from tests.kit.odd_models import Change, packed, renamed, variant, without

QUERY = "layers.1.self_attn.q_proj"
METHODS = ["gptq", "awq", "compressed-tensors", "fp8", "bitsandbytes"]


def check(folder: Path) -> str:
    from transformers import AutoModelForCausalLM

    return check_checkpoint(
        AutoModelForCausalLM, Source(path=str(folder), revision=None, shown="it", where="spec.model")
    )


def after(one: Change, other: Change) -> Change:
    return lambda weights: other(one(weights))


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_a_quantized_checkpoint(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    made = packed(method)
    scale = {"bitsandbytes": "weight.absmax", "gptq": "scales", "awq": "scales", "fp8": "weight_scale_inv"}
    beside = scale.get(method, "weight_scale")
    cases: dict[str, tuple[Change, dict[str, Any], str]] = {
        "a-layer": (after(made, without("layers.1.")), {}, "missing, first 'model.layers.1.input_layernorm.weight'"),
        "a-weight": (after(made, without(f"{QUERY}.")), {}, f"1 missing, first 'model.{QUERY}.weight'"),
        "a-scale": (after(made, without(f"{QUERY}.{beside}")), {}, f"1 missing, first 'model.{QUERY}.{beside}'"),
        "layers": (made, {"num_hidden_layers": 3}, "missing, first 'model.layers.2.input_layernorm.weight'"),
        "fewer": (made, {"num_hidden_layers": 1}, "unexpected, first 'model.layers.1.input_layernorm.weight'"),
        "module": (after(made, renamed("module.")), {}, "saved inside DataParallel"),
    }
    quantization = {"quantization_config": {"quant_method": method, "bits": 4, "load_in_4bit": True}}
    assert check(variant(tiny_llama, tmp_path / "whole", made, **quantization)) == "checked"
    for name, (change, config, message) in cases.items():
        folder = variant(tiny_llama, tmp_path / name, change, **config, **quantization)
        with pytest.raises(BadRequest, match=r"^spec\.model: 'it' does not hold the weights") as refused:
            check(folder)
        assert message in str(refused.value), name


def test_layers_that_stay_as_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    def but_one(weights: dict[str, Any]) -> dict[str, Any]:
        name = f"model.{QUERY}.weight"
        return {**without(QUERY)(packed("compressed-tensors")(weights)), name: weights[name]}

    left_out = {"quant_method": "compressed-tensors", "ignore": ["lm_head", f"model.{QUERY}"]}
    assert check(variant(tiny_llama, tmp_path / "one", but_one, quantization_config=left_out)) == "checked"


def test_what_cannot_be_checked_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    folder = variant(tiny_llama, tmp_path / "new", quantization_config={"quant_method": "of-next-year"})
    assert check(folder) == "unchecked"
    assert check(tiny_llama) == "no"
