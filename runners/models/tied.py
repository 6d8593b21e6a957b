"""Models whose output layer is their embeddings: checkpoints and adapters that change only one of the two."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_HEAD = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_ROWS = 64
"""Rows that are compared: two matrices that were trained apart differ in each."""


def other_head(folder: Path, config: Any) -> str | None:
    """Name of the output layer in a checkpoint where it differs from the embeddings that the configuration ties it to.

    Transformers takes it then, and vLLM does not.

    Args:
        folder: with safetensors; other checkpoints are not compared.
    """
    if not config.get_text_config().tie_word_embeddings:
        return None
    files = _files(folder)
    head = next((name for name in files if name.endswith(_HEAD)), None)
    embeddings = next((name for name in files if name.endswith(_EMBEDDINGS)), None)
    if head is None or embeddings is None:
        return None
    from safetensors import safe_open

    rows = []
    for name in (head, embeddings):
        with safe_open(files[name], "pt") as weights:
            rows.append(weights.get_slice(name)[:_ROWS])
    return None if rows[0].shape == rows[1].shape and bool((rows[0] == rows[1]).all()) else head


def _files(folder: Path) -> dict[str, Path]:
    """Each weight of a checkpoint, and the file that it lies in."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        from safetensors import safe_open

        with safe_open(single, "pt") as weights:
            return dict.fromkeys(weights.keys(), single)
    if not index.is_file():
        return {}
    return {name: folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}


def untie(model: Any, names: Iterable[str]) -> None:
    """Give the output layer its own weights where an adapter changes it or the embeddings that it is tied to.

    What is merged into one of two tied layers would otherwise change the other, too.

    Args:
        model: of Transformers, without the adapter.
        names: of the adapter's weights.
    """
    import torch

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None or head.weight is not embeddings.weight:
        return
    tied = [f".{name}." for name, module in model.named_modules() if module is head or module is embeddings]
    if not any(layer in name for name in names for layer in tied):
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
