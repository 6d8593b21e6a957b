"""A runner with a row log that computes nothing heavy."""

from __future__ import annotations

import contextlib
from typing import Any

from runners.api import Context, Runner
from runners.inference.merge import folder_of, read_children
from runners.rows.log import report_rows
from runners.rows.opening import open_rows


class RowsRunner(Runner):
    """Answers `spec.count` items, then those of merged children: the first `spec.quick` at once, the others after
    `spec.row_s` seconds each."""

    def run(self, ctx: Context) -> dict[str, Any]:
        tasks = [(ctx.task_id, ctx.spec, "spec", ctx.out_dir)]
        tasks += [(each.task_id, each.spec, each.where, folder_of(ctx, each.task_id)) for each in read_children(ctx)]
        results: dict[str, dict[str, Any]] = {}
        with contextlib.ExitStack() as stack:
            logs = {}
            for task_id, spec, where, folder in tasks:
                keys = [f"{spec.get('model', '')}{number}" for number in range(spec["count"])]
                log = open_rows(ctx, spec, where, folder, keys, lambda _, row: row.item, task_id=task_id)
                logs[task_id] = stack.enter_context(log)
            stack.callback(report_rows, ctx, logs.values())
            for task_id, spec, _, _ in tasks:
                log = logs[task_id]
                for index in range(spec["count"]):
                    if index not in log.rows:
                        ctx.sleep(0 if index < spec.get("quick", 0) else spec["row_s"])
                        log.add(index, {"index": index, "output": str(index)}, completion_tokens=1)
                results[task_id] = {"ok": True, "items": log.items(), "reused": log.reused}
        result = results.pop(ctx.task_id)
        return result | ({"children": results} if results else {})
