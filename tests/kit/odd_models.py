"""Tiny models whose checkpoints are not what their config.json says, each from a kind of public bug report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runners.models.builtin import train_tokenizer

Change = Callable[[dict[str, Any]], dict[str, Any]]


def variant(of: Path, folder: Path, change: Change = dict, **config: Any) -> Path:
    """A copy of the model in `of` with changed weights and config.json."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(of, folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    written = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def renamed(prefix: str) -> Change:
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def without(part: str) -> Change:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def scaled(part: str, factor: float) -> Change:
    return lambda weights: {name: weight * factor if part in name else weight for name, weight in weights.items()}


def small_config(vocab_size: int, **changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **changes,
        }
    )


def write(model_class: Any, folder: Path, config: Any = None, tokenizer: Any = None) -> Path:
    """A random model of a class with the built-in tokenizer."""
    import torch

    tokenizer = tokenizer or train_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config or small_config(len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def packed(method: str) -> Change:
    """The weights of the layers' matrices under the names of a quantization; only compressed-tensors' are numbers."""
    import torch

    small = torch.zeros(1)
    beside: dict[str, dict[str, Any]] = {
        "gptq": {"qweight": small, "qzeros": small, "scales": small, "g_idx": small},
        "awq": {"qweight": small, "qzeros": small, "scales": small},
        "fp8": {"weight": None, "weight_scale_inv": small},
        "bitsandbytes": {"weight": small.byte(), "weight.absmax": small, "weight.quant_state.bitsandbytes__nf4": small},
    }

    def change(weights: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, weight in weights.items():
            place = name.removesuffix(".weight")
            if ".layers." not in name or not place.endswith("_proj"):
                found[name] = weight
            elif method == "compressed-tensors":
                scale = weight.abs().amax(1, keepdim=True) / 127
                found |= {name: torch.round(weight / scale).to(torch.int8), f"{name}_scale": scale}
            else:
                tensors = {each: weight if value is None else value for each, value in beside[method].items()}
                found |= {f"{place}.{each}": value.clone() for each, value in tensors.items()}
        return found

    return change


INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
"""`quantization_config` of `packed("compressed-tensors")`: 8-bit integers with a scale for each row."""
