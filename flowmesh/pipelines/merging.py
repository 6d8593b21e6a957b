"""Equal requests of one pipeline: stages that wait at the same time and differ in their data only run as one task."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from flowmesh.pipelines.parts import Part

TYPES = ("inference", "rag", "embedding", "score")
"""Task types that run merged children."""
MAX_CHILDREN = 64
_OWN = ("data", "_upstreamResults", "postprocess", "query", "documents", "pairs")
"""Fields of a spec in which merged requests may differ."""
_OWN_OF_INFERENCE = ("system_prompt", "systemPrompt")


def merge_key(spec: dict[str, Any]) -> str | None:
    """Equal for specs that can run as one task; None: it runs by itself."""
    output = spec.get("output")
    destination = output.get("destination") if isinstance(output, dict) else None
    has_folder = isinstance(destination, dict) and destination.get("path") is not None
    if spec.get("taskType") not in TYPES or "shard" in spec or has_folder:
        return None
    shared = {name: value for name, value in spec.items() if name not in _OWN}
    if isinstance(inference := shared.get("inference"), dict):
        shared["inference"] = {name: value for name, value in inference.items() if name not in _OWN_OF_INFERENCE}
    return hashlib.sha256(json.dumps(shared, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def together(first: Part, others: list[Part]) -> list[Part]:
    """Those of `others` that run in one task with `first`."""
    if first.merge_key is None:
        return []
    return [part for part in others if part.merge_key == first.merge_key][:MAX_CHILDREN]
