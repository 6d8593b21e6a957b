"""The thread pools of math libraries: a fork server keeps each at one thread, and a child gives them theirs back."""

from __future__ import annotations

import functools
import sys
from typing import Any


@functools.cache
def find() -> Any:
    """What threadpoolctl finds of them, or None; in the fork server, as it looks at every library that is loaded."""
    if "numpy" not in sys.modules:
        return None
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()


def use(count: int) -> None:
    """Have each use so many threads, in a child."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(count)
    if (pools := find()) is not None:
        pools.limit(limits=count)
