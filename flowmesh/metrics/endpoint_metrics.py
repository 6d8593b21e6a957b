"""The metrics of models that tasks serve, as their servers report them; a series ends with its task."""

from __future__ import annotations

from flowmesh.execution.run_table import RunTable
from flowmesh.messages.serving import BOUNDS
from flowmesh.metrics.families import Family, Histogram

LABELS = ("task", "model")
MOST_CHARS = 200
"""Of a model's name, which the task's process wrote."""
_COUNTS = {
    "requests": "Requests to the model.",
    "failed": "Requests that were answered with a status of 500 and above, or not at all.",
    "prompt_tokens": "Tokens of requests, as the server reported them.",
    "completion_tokens": "Tokens of answers, as the server reported them.",
    "restarts": "Times that the model was loaded again.",
}
_GAUGES = {
    "running": "Requests that are being answered.",
    "waiting": "Requests that wait in the engine.",
    "kv_cache_usage": "Used part of the engine's cache, 0 to 1.",
}
_TIMES = {
    "first_token": "From a request to the first part of its streamed answer.",
    "request": "From a request to the end of its answer.",
}


class EndpointMetrics:
    """At most one series a slot in each family."""

    def __init__(self, runs: RunTable) -> None:
        self._runs = runs
        self._up = Family(
            "gauge", "flowmesh_endpoint_up", "1 if the model is served, 0 while it is loaded again.", LABELS
        )
        self._values = {
            name: Family("counter", f"flowmesh_endpoint_{name}_total", about, LABELS) for name, about in _COUNTS.items()
        } | {name: Family("gauge", f"flowmesh_endpoint_{name}", about, LABELS) for name, about in _GAUGES.items()}
        self._times = {
            name: Histogram(f"flowmesh_endpoint_{name}_seconds", about, LABELS, BOUNDS)
            for name, about in _TIMES.items()
        }

    def families(self) -> list[Family | Histogram]:
        """All of them, as the tasks have them now."""
        families: list[Family | Histogram] = [self._up, *self._values.values(), *self._times.values()]
        for family in families:
            family.clear()
        for run in self._runs:
            if run.serving is None or not run.keeps_endpoint:
                continue
            labels = run.task_id, run.serving.model[:MOST_CHARS]
            self._up.set(float(run.serving.ready), *labels)
            for name, value in run.served_numbers.values.items():
                self._values[name].set(value, *labels)
            for name, times in run.served_numbers.times.items():
                self._times[name].set(times[:-1], times[-1], *labels)
        return families
