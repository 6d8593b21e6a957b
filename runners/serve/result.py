"""The result of a serving task, from what its gate has counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runners.serve.task import ServeTask


def result_of(  # noqa: PLR0917
    task: ServeTask, source: str, base_url: str, reason: str, numbers: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """
    Args:
        source: where the weights came from.
        reason: why it ended.
        numbers: as `Gate.numbers` has them.
        seconds: how long it served.
    """

    def count(name: str) -> int:
        return int(numbers.get(name, 0))

    return {
        "ok": True,
        "model": {"name": task.name, "source": source},
        "base_url": base_url,
        "reason": reason,
        "requests": count("requests"),
        "failed": count("failed"),
        "tokens": count("completion_tokens"),
        "usage": {"prompt_tokens": count("prompt_tokens"), "completion_tokens": count("completion_tokens")},
        "seconds": round(seconds, 3),
    }
