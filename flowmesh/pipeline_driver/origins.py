"""Which worker gave which path: a stage that fails with another node's path is told so."""

from __future__ import annotations

from typing import Any

from flowmesh.pipelines.references import texts

MOST = 10_000
_LONGEST = 4096


class Origins:
    """The absolute paths in results, with the workers that gave them."""

    def __init__(self) -> None:
        self._workers: dict[str, str] = {}

    def learn(self, result: dict[str, Any] | None, worker: str | None) -> None:
        """Note the paths of a result."""
        if result is None or not worker:
            return
        for _, value in texts(result):
            if value.startswith("/") and len(value) < _LONGEST and len(self._workers) < MOST:
                self._workers[value] = worker

    def explain(self, document: dict[str, Any], worker: str) -> str:
        """What to add to the error of a task that failed on `worker`; empty: nothing."""
        for _, value in texts(document.get("spec") or {}):
            giver = self._workers.get(value)
            if giver is not None and worker and giver != worker:
                return (
                    f" ({value} is a path of {giver}, and this task ran on {worker}: let both nodes have the same "
                    "RESULTS_DIR, or deliver over http and reference the file's address, such as "
                    "final_model_archive_url)"
                )
        return ""
