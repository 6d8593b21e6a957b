"""What vLLM's engine reports of itself after each step, for the node."""

from __future__ import annotations

from typing import Any


class EngineNumbers:
    """A stat logger of vLLM that keeps the last numbers instead of logging them.

    The event loop of the HTTP server writes, one attribute at a time; any thread may read.
    """

    def __init__(self) -> None:
        self._running = 0
        self._waiting = 0
        self._cache_usage = 0.0
        self._prompt_tokens = 0
        self._generation_tokens = 0

    def read(self) -> dict[str, float]:
        """Requests that run and wait, the share of the key-value cache in use (0 to 1), and tokens since the start.

        Tokens are those of all requests, the task's own checks and requests that were not finished included.
        """
        return {
            "running": self._running,
            "waiting": self._waiting,
            "kv_cache": self._cache_usage,
            "prompt_tokens": self._prompt_tokens,
            "generation_tokens": self._generation_tokens,
        }

    def record(self, scheduler_stats: Any, iteration_stats: Any, **_others: Any) -> None:
        if scheduler_stats is not None:
            self._running = scheduler_stats.num_running_reqs
            self._waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._cache_usage = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self._prompt_tokens += iteration_stats.num_prompt_tokens
            self._generation_tokens += iteration_stats.num_generation_tokens

    def log(self) -> None:
        """Nothing is logged."""

    def log_engine_initialized(self) -> None:
        """Nothing is logged."""
