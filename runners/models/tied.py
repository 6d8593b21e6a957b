"""Models whose output layer is their embeddings, before an adapter is merged into one of the two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


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
