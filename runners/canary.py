"""What the first child of a fork server does, to show that its forks compute: once, before any task."""

from __future__ import annotations

import sys


def check() -> None:
    """Use each heavy library that was imported, with more than one thread where it has them.

    Raises:
        RuntimeError: a result was wrong.
    """
    if "torch" in sys.modules:
        _multiply()
    if "tokenizers" in sys.modules:
        _tokenize()


def _multiply() -> None:
    import torch

    torch.set_num_threads(2)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        ones = torch.ones(512, 512, device=device)
        if float((ones @ ones).sum()) != 512.0**3:
            raise RuntimeError(f"a matrix product on {device} was wrong")


def _tokenize() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if [e.ids for e in tokenizer.encode_batch(["a b c"] * 64)] != [[0, 1, 2]] * 64:
        raise RuntimeError("a tokenizer's result was wrong")
