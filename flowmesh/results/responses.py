"""The content of `responses.json`, for a success, for a failure and for each merged child."""

from __future__ import annotations

from typing import Any

from flowmesh.messages.job import Outcome
from flowmesh.results.job import Failure


def with_warnings(result: dict[str, Any], warnings: tuple[str, ...]) -> dict[str, Any]:
    """A result with the node's warnings before the runner's. Again with the same ones, nothing changes."""
    own = result.get("warnings")
    given = own if isinstance(own, list) else []
    if not warnings or given[: len(warnings)] == list(warnings):
        return result
    return {**result, "warnings": [*warnings, *given]}


def success(outcome: Outcome, extra: dict[str, Any]) -> dict[str, Any]:
    """The runner's result with the node's additions. A new mapping, and so are its `children`."""
    result = {**extra, **(outcome.result or {})}
    children = result.get("children")
    if isinstance(children, dict):
        result["children"] = {
            task_id: dict(part) if isinstance(part, dict) else part for task_id, part in children.items()
        }
    return result


def failure(task_id: str, verdict: Failure) -> dict[str, Any]:
    """The result of a task that failed."""
    content: dict[str, Any] = {
        "ok": False,
        "error": " ".join(verdict.error.split()),
        "error_kind": verdict.error_kind,
        "task_id": task_id,
    }
    if verdict.detail:
        content["detail"] = verdict.detail
    if verdict.evidence:
        content["evidence"] = verdict.evidence
    if verdict.warnings:
        content["warnings"] = list(verdict.warnings)
    if verdict.log_tail:
        content["log_tail"] = list(verdict.log_tail)
    return content


def child_success(task_id: str, result: dict[str, Any]) -> dict[str, Any]:
    """A merged child's own result, as if it had run alone; `ok` is false for a child that the run refused."""
    children = result.get("children")
    part = children.get(task_id) if isinstance(children, dict) else None
    if not isinstance(part, dict):
        missing = Failure(error="the merged run gave no result for this task", error_kind="error")
        return failure(task_id, missing)
    content = {"ok": "error" not in part}
    if "model" in result:
        content["model"] = result["model"]
    return {**content, **part}
