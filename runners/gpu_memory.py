"""Recognizes errors that mean a GPU ran out of memory; most libraries have a class or a message of their own."""

from __future__ import annotations

import re

_MESSAGE = re.compile(
    r"CUDA out of memory|CUDA (?:driver )?error: out of memory|Cuda failure \d* ?'out of memory'|"
    r"(?:CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


def is_shortage(error: BaseException) -> bool:
    """Whether `error` means that a GPU ran out of memory."""
    return type(error).__name__ == "OutOfMemoryError" or bool(_MESSAGE.search(str(error)))
