"""The random models that the speed steps use, made on the spot: 1.1 B parameters in bfloat16, or a tiny one.

Imported by the bare scripts too: nothing of the node is used here but its tokenizer's recipe.
"""

from __future__ import annotations

import json
from pathlib import Path

VOCABULARY = 32_000
PROMPTS = [
    f"Row {n} says that {n} plus {n} is {2 * n}, and then waits for the next batch of the queue." for n in range(64)
]
ROWS = [" ".join([f"row {n} of the training data says that {n} plus {n} is {2 * n}."] * 24) for n in range(256)]
"""About 500 tokens each."""


def write(folder: Path, *, tiny: bool) -> int:
    """Write a model with its tokenizer, and return its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from runners.models.builtin import train_tokenizer, write_tiny_llama

    folder.mkdir(parents=True, exist_ok=True)
    if tiny:
        write_tiny_llama(folder)
        return 560_000
    train_tokenizer().save_pretrained(folder)
    widen(folder / "tokenizer.json")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def widen(path: Path) -> None:
    """Give a tokenizer as many tokens as the model has rows: a real vocabulary's width, which sampling pays for."""
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    for number in range(len(vocabulary), VOCABULARY):
        vocabulary[f"extra{number}"] = number
    path.write_text(json.dumps(found))
