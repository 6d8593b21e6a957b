"""What vLLM's engine reports of itself after each step, for the node."""

from __future__ import annotations

from typing import Any


class EngineNumbers:
    """A stat logger of vLLM that keeps the last numbers instead of logging them.

    The event loop of the HTTP server writes, one attribute at a time; any thread may read.
    """

    def __init__(self) -> None:
        self._waiting = 0
        self._cache_usage = 0.0

    def read(self) -> dict[str, float]:
        """By the names of `flowmesh.messages.serving`. What the gate counts itself is not here."""
        return {"waiting": self._waiting, "kv_cache_usage": self._cache_usage}

    def record(self, scheduler_stats: Any, *_of_steps: Any, **_others: Any) -> None:
        if scheduler_stats is not None:
            self._waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._cache_usage = scheduler_stats.kv_cache_usage

    def log(self) -> None:
        """Nothing is logged."""

    def log_engine_initialized(self) -> None:
        """Nothing is logged."""
