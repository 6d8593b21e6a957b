"""Environment variables of the worker that this node replaces: what becomes of those that are no settings here."""

from __future__ import annotations

from collections.abc import Mapping

LOG_TO_STDOUT = "WORKER_LOG_TO_STDOUT"
"""Honoured: the node's log goes to stdout instead of stderr."""

NOT_USED = {
    "WORKER_EXECUTOR_MASK": (
        "this node offers every task type whose libraries are installed (flowmesh-supervisor --check lists them); "
        "install only the extras that it should offer, or give [task_types.NAME] another environment"
    ),
    "RESULTS_UPLOAD_URL": (
        "results go where each task's output.destination says; for http destinations without a url, set "
        "ORCHESTRATOR_BASE_URL (delivery.orchestrator_url)"
    ),
}
"""By name: what to do instead."""

_FALSE = frozenset(("0", "false", "no", "off"))


def warnings(environ: Mapping[str, str]) -> list[str]:
    """A line for each variable that is set and has no effect. Never shows a value."""
    return [
        f"{name} is set and not used: {why}; see docs/migrate.md" for name, why in NOT_USED.items() if environ.get(name)
    ]


def logs_to_stdout(environ: Mapping[str, str]) -> bool:
    """Whether WORKER_LOG_TO_STDOUT asks for that."""
    value = environ.get(LOG_TO_STDOUT, "").strip().lower()
    return bool(value) and value not in _FALSE
