"""Whether an error says that a GPU's memory was too small. Most libraries have an error of their own for that."""

from __future__ import annotations

import re

_TOLD = re.compile(
    r"CUDA out of memory|CUDA (?:driver )?error: out of memory|Cuda failure \d* ?'out of memory'|"
    r"(?:CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


def is_shortage(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or bool(_TOLD.search(str(error)))
