"""The execution log: each step when it happens, whole in `execution_log.jsonl`, shortened in the result."""

from __future__ import annotations

import datetime
import json
import threading
from collections import Counter
from typing import IO, Any

from flowmesh.redaction import Redactor
from runners.api import Context

FILE = "execution_log.jsonl"
FILE_CHARS = 64 * 1024
"""Of one text in the file."""
RESULT_CHARS = 2000
"""Of one text in the result."""
RESULT_ENTRIES = 500


class Journal:
    """Thread-safe: tools of one turn may run in parallel."""

    def __init__(self, ctx: Context, redact: Redactor) -> None:
        self._ctx = ctx
        self._redact = redact
        self._lock = threading.Lock()
        self._file: IO[str] = (ctx.out_dir / FILE).open("w", encoding="utf-8")
        self._kept: list[dict[str, Any]] = []
        self._left_out = 0
        self.rows = 0
        """Items of the task that are finished; for its progress."""
        self.counts: Counter[str] = Counter()
        """Entries by event; steps of the whole task."""

    def note(self, item: int, agent: str, event: str, **fields: Any) -> None:
        """Record one event.

        Args:
            item: which of the task's runs.
            agent: which of the run's agents.
            event: plan, model, tool_call, tool_result, error, answer, …
        """
        clean = self._redact.deep(fields)
        head = {"ts": datetime.datetime.now(datetime.UTC).isoformat(), "item": item, "agent": agent, "event": event}
        with self._lock:
            self.counts[event] += 1
            self._file.write(json.dumps({**head, **_cut(clean, FILE_CHARS)}, ensure_ascii=False, default=str) + "\n")
            self._file.flush()
            if len(self._kept) < RESULT_ENTRIES:
                self._kept.append({**head, **_cut(clean, RESULT_CHARS)})
            else:
                self._left_out += 1
            steps = self.counts["model"] + self.counts["tool_result"]
        self._ctx.log.info("%s item=%d agent=%s %s", event, item, agent, _shown(clean))
        if threading.current_thread() is threading.main_thread():
            self._ctx.progress(steps, None, "steps", item=float(item), rows=float(self.rows))

    def entries(self) -> list[dict[str, Any]]:
        """For the result."""
        if not self._left_out:
            return self._kept
        return [*self._kept, {"event": "left_out", "count": self._left_out, "file": FILE}]

    def close(self) -> None:
        self._file.close()


def _cut(value: Any, limit: int) -> Any:
    match value:
        case str() if len(value) > limit:
            return f"{value[:limit]}… ({len(value)} characters)"
        case dict():
            return {key: _cut(each, limit) for key, each in value.items()}
        case list():
            return [_cut(each, limit) for each in value]
    return value


def _shown(fields: dict[str, Any]) -> str:
    text = " ".join(f"{name}={value!r}" for name, value in fields.items())
    return text if len(text) <= 300 else f"{text[:299]}…"
