"""A runner with a row log that computes nothing heavy."""

from __future__ import annotations

from typing import Any

from runners.api import Context, Runner
from runners.rows.log import RowLog, report_rows


class RowsRunner(Runner):
    """Answers `spec.count` items, each after `spec.row_s` seconds."""

    def run(self, ctx: Context) -> dict[str, Any]:
        count = ctx.spec["count"]
        with RowLog(ctx.out_dir, [str(number) for number in range(count)]) as log:
            log.take((), lambda _, row: row.item)
            for index in range(count):
                if index not in log.rows:
                    ctx.sleep(ctx.spec["row_s"])
                    log.add(index, {"index": index, "output": str(index)}, completion_tokens=1)
            report_rows(ctx, [log])
            return {"ok": True, "items": log.items(), "reused": log.reused}
