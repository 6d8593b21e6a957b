"""A stage's spec with all references replaced, as its tasks get it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmesh.pipelines import references
from flowmesh.pipelines.document import Stage


def resolve(stage: Stage, results: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The spec of a stage whose dependencies have ended.

    Args:
        results: by stage that has one.
        names: that a reference may begin with.

    Raises:
        FieldError: a reference has no value; names the field, the stage and the path.
    """

    def value(expr: str) -> Any:
        found = references.split(expr, names)
        if found is None:
            raise references.NotAReference
        return references.value_at(found, results)

    spec: dict[str, Any] = references.replace(stage.spec, value, place=stage.entry.place)
    upstream = _upstream(spec, results)
    if upstream:
        spec["_upstreamResults"] = {**(spec.get("_upstreamResults") or {}), **upstream}
    return spec


def _upstream(spec: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """The results that a graph template's columns name."""
    named = {references.stage_of_column(column, list(results)) for column in references.columns_of(spec)}
    return {name: results[name] for name in sorted(filter(None, named))}
