"""The thread pools of math libraries: one thread in a fork server; a child sets the number that its task may use."""

from __future__ import annotations

import functools
import sys
from typing import Any


@functools.cache
def find() -> Any:
    """A threadpoolctl controller of the pools; None without numpy or threadpoolctl.

    Called first in the fork server, whose children inherit the result: it inspects every loaded library.
    """
    if "numpy" not in sys.modules:
        return None
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()


def use(count: int) -> None:
    """Set the number of threads of torch and of each pool. Called in a child."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(count)
    if (pools := find()) is not None:
        pools.limit(limits=count)
