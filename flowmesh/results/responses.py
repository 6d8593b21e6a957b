"""What `responses.json` says, of a success, of a failure and of each merged child."""

from __future__ import annotations

from typing import Any

from flowmesh.messages.job import Outcome
from flowmesh.results.job import Failure


def success(outcome: Outcome, extra: dict[str, Any]) -> dict[str, Any]:
    """The runner's result with what the node adds to it. A new mapping; its `children` are new ones too."""
    result = {**extra, **(outcome.result or {})}
    children = result.get("children")
    if isinstance(children, dict):
        result["children"] = {
            task_id: dict(part) if isinstance(part, dict) else part for task_id, part in children.items()
        }
    return result


def failure(task_id: str, verdict: Failure) -> dict[str, Any]:
    """A task that has no result."""
    said: dict[str, Any] = {
        "ok": False,
        "error": " ".join(verdict.error.split()),
        "error_kind": verdict.error_kind,
        "task_id": task_id,
    }
    if verdict.detail:
        said["detail"] = verdict.detail
    if verdict.evidence:
        said["evidence"] = verdict.evidence
    if verdict.log_tail:
        said["log_tail"] = list(verdict.log_tail)
    return said


def child_success(task_id: str, result: dict[str, Any]) -> dict[str, Any]:
    """A merged child's own result, as if it had run alone; a child that the run refused says so."""
    children = result.get("children")
    part = children.get(task_id) if isinstance(children, dict) else None
    if not isinstance(part, dict):
        missing = Failure(error="the merged run gave no result for this task", error_kind="error")
        return failure(task_id, missing)
    said = {"ok": "error" not in part}
    if "model" in result:
        said["model"] = result["model"]
    return {**said, **part}
