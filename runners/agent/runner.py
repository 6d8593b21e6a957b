"""The agent runner: one run per item, each with its own folder, time limit and outcome."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.messages.rows import Row
from runners.agent.rows import WORKSPACE, clear, files_digest, item_folder, stands
from runners.agent.task import AgentTask, read_agent
from runners.api import BadRequest, Context, MissingDependency, Runner, RunnerError
from runners.rows.log import RowLog, report_rows
from runners.rows.opening import open_rows

OUTPUT_FILE = "agent_output.txt"
BATCH_LOGS = "batch_logs"
"""Folder with the output of each item, `task_N_output.txt`, counted from 1."""
BATCH_SUMMARY = "batch_summary.json"
_TOKENS = ("prompt_tokens", "completion_tokens")


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
        with contextlib.ExitStack() as stack:
            stack.callback(session.close)
            session.open()
            log = stack.enter_context(self._open_log(ctx, task, session))
            stack.callback(report_rows, ctx, [log])
            ctx.phase("run")
            for index in sorted(log.rows):
                _write_output(ctx.out_dir, index, log, task)
            for index, text in enumerate(task.tasks):
                session.journal.rows = len(log.rows)
                ctx.progress(len(log.rows), len(task.tasks), "items")
                if index not in log.rows:
                    self._run_item(ctx, task, session, log, index, text)
                    _write_output(ctx.out_dir, index, log, task)
        items = log.items()
        failed = [item for item in items if item["finish_reason"] == "failed"]
        if len(failed) == len(items):
            first = failed[0]["error"]
            raise RunnerError(first if len(items) == 1 else f"all {len(items)} runs failed; the first: {first}")
        for item in items:
            for problem in item.get("problems", ()):
                ctx.log.warning("item %d: %s", item["index"], problem)
        prompt, completion = (sum(getattr(row, name) for row in log.rows.values()) for name in _TOKENS)
        return {
            "ok": True,
            "model": session.model_name,
            "items": items,
            "usage": {
                "execution_time_sec": round(time.monotonic() - since, 6),
                "num_requests": len(items),
                "agent_config": task.config_name,
                **session.counts(),
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            },
            **({"rows": msgspec.to_builtins(log.counts)} if log.reused else {}),
            "metadata": {
                **({"tasks_count": len(items)} if task.batch else {"task": task.tasks[0]}),
                "execution_log": session.journal.entries(),
                **({"batch_summary": _summary(items, task)} if task.batch else {}),
                **session.describe(),
            },
        }

    @staticmethod
    def _open_log(ctx: Context, task: AgentTask, session: Any) -> RowLog:
        """The row log; of the workspace, only the files of the rows that stand are left."""

        def place(index: int, row: Row) -> dict[str, Any]:
            metadata = task.metadata[index]
            kept = {name: value for name, value in row.item.items() if name not in ("index", "metadata")}
            return {"index": index, **kept, **({} if metadata is None else {"metadata": metadata})}

        def stand(index: int, row: Row) -> bool:
            return not row.files or stands(item_folder(ctx.out_dir, index, batch=task.batch), row.files)

        log = open_rows(
            ctx, ctx.spec, "spec", ctx.out_dir, session.row_keys(), place, task_id=ctx.task_id, stands=stand
        )
        kept = {index for index, row in log.rows.items() if row.files}
        if task.batch or not kept:
            clear(ctx.out_dir / WORKSPACE, frozenset(item_folder(ctx.out_dir, i, batch=True).name for i in kept))
        return log

    @staticmethod
    def _run_item(ctx: Context, task: AgentTask, session: Any, log: RowLog, index: int, text: str) -> None:  # noqa: PLR0917
        prompt, completion = session.tokens()
        item = session.run_item(index, text)
        if (metadata := task.metadata[index]) is not None:
            item["metadata"] = metadata
        again = item["finish_reason"] == "failed"
        try:
            files = files_digest(item_folder(ctx.out_dir, index, batch=task.batch))
        except OSError as error:
            ctx.log.warning("a retry runs this item again item=%d: %s", index, error)
            files, again = "", True
        spent = [now - before for now, before in zip(session.tokens(), (prompt, completion), strict=True)]
        log.add(index, item, prompt_tokens=spent[0], completion_tokens=spent[1], again=again, files=files)


def _summary(items: list[dict[str, Any]], task: AgentTask) -> dict[str, Any]:
    failed = [item["index"] for item in items if item["finish_reason"] == "failed"]
    completed = len(items) - len(failed)
    total = len(task.tasks)
    return {
        "total": total, "total_tasks": total, "completed": completed, "failed": len(failed), "failed_items": failed,
    }  # fmt: skip


def _write_output(folder: Path, index: int, log: RowLog, task: AgentTask) -> None:
    """Written after each item, so that earlier outputs remain if a later item ends the task."""
    items = log.items()
    if not task.batch:
        _write(folder / OUTPUT_FILE, items[0]["output"])
        return
    sections = (f"## {item['index']} ({item['finish_reason']})\n\n{_text(item)}" for item in items)
    _write(folder / OUTPUT_FILE, "\n\n".join(sections))
    logs = folder / BATCH_LOGS
    logs.mkdir(exist_ok=True)
    _write(logs / f"task_{index + 1}_output.txt", _text(log.rows[index].item))
    _write(folder / BATCH_SUMMARY, json.dumps(_summary(items, task), indent=2))


def _text(item: dict[str, Any]) -> str:
    """An item's output; why there is none, where it failed."""
    return item["output"] or item.get("error", "")


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8", errors="replace")
