"""The JSON Schema of a pipeline's document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from flowmesh.pipelines.fields import ALIASES, Graph, StageFields
from flowmesh.tasks.catalogue import BUILTIN, TaskType
from flowmesh.tasks.schemas import DRAFT

_REF = "#/$defs/{name}"
_PREFIX = "#/$defs/"


def pipeline_schema(types: Iterable[TaskType] = BUILTIN) -> dict[str, Any]:
    """The schema of a pipeline's document: a task's, with stages whose specs may have references in any place.

    A stage may be completed by the outer spec, so that nothing is required but its name.
    """
    (stage, graph), defs = msgspec.json.schema_components([StageFields, Graph], ref_template=_REF)
    fields = defs.pop(stage["$ref"].removeprefix(_PREFIX))
    fields.pop("additionalProperties", None)  # a stage without `spec` has the spec's fields beside its own
    depends = {"anyOf": [fields["properties"]["dependsOn"], {"type": "string"}]}
    fields["properties"] |= dict.fromkeys(("dependsOn", *ALIASES), depends)
    graph_fields = defs.pop(graph["$ref"].removeprefix(_PREFIX))
    stages = {"type": "array", "minItems": 1, "items": {"$ref": _REF.format(name="Stage")}}
    graph_fields["properties"]["nodes"] = stages
    known = [kind.name for kind in types if kind.sections]
    spec = {
        "type": "object",
        "properties": {
            "taskType": {"anyOf": [{"enum": known}, {"type": "string"}]},
            "stages": stages,
            "graph": graph_fields,
            "parallel": fields["properties"]["parallel"],
            "merge": fields["properties"]["merge"],
        },
        "oneOf": [{"required": ["stages"]}, {"required": ["graph"]}],
    }
    return {
        "$schema": DRAFT,
        "title": "FlowMesh pipeline",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": ["string", "null"]},
            "kind": {"type": ["string", "null"]},
            "metadata": {"type": ["object", "null"]},
            "spec": spec,
        },
        "$defs": {**defs, "Stage": fields},
    }
