"""The agent runner: one run per item, each with its own folder, time limit and outcome."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from runners.agent.task import AgentTask, read_agent
from runners.api import BadRequest, Context, MissingDependency, Runner, RunnerError

OUTPUT_FILE = "agent_output.txt"
BATCH_LOGS = "batch_logs"
"""Folder with the output of each item, `task_N_output.txt`, counted from 1."""
BATCH_SUMMARY = "batch_summary.json"


class AgentRunner(Runner):
    """Task type `agent`."""

    def run(self, ctx: Context) -> dict[str, Any]:
        ctx.phase("prepare")
        task = read_agent(ctx)
        for library in ("smolagents", "openai"):
            if importlib.util.find_spec(library) is None:
                raise MissingDependency(library)
        from runners.agent.run import Session
        from runners.agent.secrets import task_redactor

        redact = task_redactor()
        try:
            return self._run(ctx, task, Session(ctx, task, redact))
        except RunnerError as error:
            clean = redact(str(error))
            kind = BadRequest if isinstance(error, BadRequest) else RunnerError
            made = kind(clean)
            made.fault = error.fault
            raise made from None  # the cause may show a key

    def _run(self, ctx: Context, task: AgentTask, session: Any) -> dict[str, Any]:
        since = time.monotonic()
        items: list[dict[str, Any]] = []
        try:
            session.open()
            ctx.phase("run")
            for index, text in enumerate(task.tasks):
                ctx.progress(index, len(task.tasks), "items")
                item = session.run_item(index, text)
                if (metadata := task.metadata[index]) is not None:
                    item["metadata"] = metadata
                items.append(item)
                _write_output(ctx.out_dir, items, task)
        finally:
            session.close()
        failed = [item for item in items if item["finish_reason"] == "failed"]
        if len(failed) == len(items):
            first = failed[0]["error"]
            raise RunnerError(first if len(items) == 1 else f"all {len(items)} runs failed; the first: {first}")
        return {
            "ok": True,
            "model": session.model_name,
            "items": items,
            "usage": {
                "execution_time_sec": round(time.monotonic() - since, 6),
                "num_requests": len(items),
                "agent_config": task.config_name,
                **session.counts(),
            },
            "metadata": {
                **({"tasks_count": len(items)} if task.batch else {"task": task.tasks[0]}),
                "execution_log": session.journal.entries(),
                **({"batch_summary": _summary(items, task)} if task.batch else {}),
                **session.describe(),
            },
        }


def _summary(items: list[dict[str, Any]], task: AgentTask) -> dict[str, Any]:
    failed = [item["index"] for item in items if item["finish_reason"] == "failed"]
    completed = len(items) - len(failed)
    total = len(task.tasks)
    return {
        "total": total, "total_tasks": total, "completed": completed, "failed": len(failed), "failed_items": failed,
    }  # fmt: skip


def _write_output(folder: Path, items: list[dict[str, Any]], task: AgentTask) -> None:
    """Written after each item, so that earlier outputs remain if a later item ends the task."""
    if not task.batch:
        _write(folder / OUTPUT_FILE, items[0]["output"])
        return
    sections = (f"## {item['index']} ({item['finish_reason']})\n\n{_text(item)}" for item in items)
    _write(folder / OUTPUT_FILE, "\n\n".join(sections))
    logs = folder / BATCH_LOGS
    logs.mkdir(exist_ok=True)
    _write(logs / f"task_{items[-1]['index'] + 1}_output.txt", _text(items[-1]))
    _write(folder / BATCH_SUMMARY, json.dumps(_summary(items, task), indent=2))


def _text(item: dict[str, Any]) -> str:
    """An item's output; why there is none, where it failed."""
    return item["output"] or item.get("error", "")


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8", errors="replace")
