"""Self-tests that run in a child before tasks do: of each new fork server, and of a GPU that had a fault."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from runners.gpu_memory import is_shortage

SIDE = 1024
BLOCK_BYTES = 1 << 30
PATTERN = 0xA5


def check() -> None:
    """Use each heavy library that the fork server imported, with several threads where it has them.

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
    _check_product("cpu")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            _check_product(f"cuda:{index}")
        except RuntimeError as error:
            # Another task uses that GPU, which is no fault of this environment. One GPU is enough, and none is needed.
            if not (is_shortage(error) or "busy or unavailable" in str(error)):
                raise
            sys.stderr.write(f"canary: skipped GPU {index}, which is in use: {error}\n")
        else:
            return


def _check_product(device: str) -> None:
    import torch

    ones = torch.ones(512, 512, device=device)
    if float((ones @ ones).sum()) != 512.0**3:
        raise RuntimeError(f"a matrix product on {device} was wrong")


def _tokenize() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if [e.ids for e in tokenizer.encode_batch(["a b c"] * 64)] != [[0, 1, 2]] * 64:
        raise RuntimeError("a tokenizer's result was wrong")


def check_gpu(_pipe: object, _spool: Path) -> int:
    """Main function of a child: on each of its GPUs allocate, write and read back, multiply, compare, free.

    Raises:
        RuntimeError: a GPU is missing, or a result was wrong. CUDA's own errors pass through.
    """
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not torch.cuda.is_available():
        raise RuntimeError('torch cannot use CUDA in the environment "default": install its CUDA build there')
    if torch.cuda.device_count() != len(visible):
        raise RuntimeError(f"CUDA sees {torch.cuda.device_count()} of {len(visible)} GPUs: {', '.join(visible)}")
    # Whole numbers whose sums float32 holds exactly, so that results must match to the last bit.
    left, right = torch.randint(0, 8, (2, SIDE, SIDE)).float()
    product = left @ right
    for index, name in enumerate(visible):
        device = torch.device("cuda", index)
        free_bytes, _ = torch.cuda.mem_get_info(device)
        block = torch.full((min(BLOCK_BYTES, free_bytes // 4),), PATTERN, dtype=torch.uint8, device=device)
        if not bool((block == PATTERN).all()):
            raise RuntimeError(f"{name}: GPU memory returned other data than was written")
        if not torch.equal((left.to(device) @ right.to(device)).cpu(), product):
            raise RuntimeError(f"{name}: a matrix product was wrong")
        del block
        torch.cuda.empty_cache()
    return 0
