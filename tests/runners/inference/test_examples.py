"""Every example in conf/tasks runs as it is; what fork servers import for vLLM leaves them safe to fork."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("transformers", reason="needs the extra 'inference'")
from runners.inference.runner import InferenceRunner
from tests.kit.paths import ROOT

EXAMPLES = sorted(path.name for path in (ROOT / "conf" / "tasks").glob("inference-*.yaml"))
NEEDS = {"inference-dataset.yaml": "datasets", "inference-vllm.yaml": "vllm"}


@pytest.mark.parametrize("name", [each for each in EXAMPLES if each not in ("inference-vllm.yaml",)])
def test_examples(make_context, monkeypatch, name: str) -> None:
    needed = NEEDS.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    monkeypatch.chdir(ROOT)  # paths in the examples begin at the checkout
    document: dict[str, Any] = yaml.safe_load((ROOT / "conf" / "tasks" / name).read_text())
    spec, children = document["spec"], document.get("merge_children")
    result = InferenceRunner().run(make_context(spec, children=children))
    assert result["ok"] is True
    if name == "inference-batch.yaml":
        assert result["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
        return
    assert result["items"]
    for child in result.get("children", {}).values():
        assert child["ok"] is True
    if "jsonl_export" in result:
        records = [json.loads(line) for line in Path(result["jsonl_export"]["path"]).read_text().splitlines()]
        assert [record["answer"] for record in records] == [item["output"] for item in result["items"]]


def test_there_is_an_example_of_everything() -> None:
    names = {"batch", "transformers", "dataset", "jsonl", "graph", "merge", "lora", "vision", "vllm"}
    assert {f"inference-{name}.yaml" for name in names} <= set(EXAMPLES)


@pytest.mark.vllm
def test_vllms_fork_server_keeps_one_thread_and_no_gpu(request) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed here")
    zygote = request.getfixturevalue("forked")
    assert (zygote.threads, zygote.cuda) == (1, False)
