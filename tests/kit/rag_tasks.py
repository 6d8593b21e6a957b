"""What the tests of the rag runner share: its corpus as a document, and ways to run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmesh.messages.job import Job
from runners.api import BadRequest, Context
from runners.rag.runner import RagRunner
from tests.kit.paths import PERMITS
from tests.kit.rag_corpus import PASSAGES

MakeContext = Callable[..., Context]
ONE = {"type": "list", "items": ["a"]}


def corpus() -> dict[str, Any]:
    return {"type": "list", "items": list(PASSAGES.values()), "metadata": [{"id": name} for name in PASSAGES]}


def rag(make_context: MakeContext, spec: dict[str, Any], **fields: Any) -> dict[str, Any]:
    result = RagRunner().run(make_context(spec, task_type="rag", **fields))
    json.dumps(result, allow_nan=False)
    return result


def refusal(make_context: MakeContext, spec: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        rag(make_context, spec, **fields)
    text = str(caught.value)
    assert "\n" not in text
    return text


def context_in(root: Path, task_id: str, spec: dict[str, Any]) -> Context:
    """As make_context, for fixtures that outlive a test."""
    folder = root / task_id
    folder.mkdir()
    job = Job(
        attempt=1,
        task_id=task_id,
        task_type="rag",
        runner="",
        task={"spec": spec},
        out_dir=str(folder),
        results_dir=str(root),
        cache_dir=str(root),
        tmp_dir=str(root),
        threads=2,
        permits=PERMITS,
    )
    return Context(job)
