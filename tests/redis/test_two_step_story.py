"""The common workflow: train a LoRA, deliver it over HTTP, and run inference with it by URL."""

from __future__ import annotations

import importlib.util
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.results_server import ResultsServer
from tests.kit.support import Node, Orchestrator

pytestmark = [
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the training extra"),
]
ADAPTER_ROWS = [f"the {colour} box holds {number} nails" for colour in ("red", "blue") for number in ("two", "nine")]


@pytest.fixture
def results(tmp_path: Path) -> Iterator[ResultsServer]:
    with ResultsServer(tmp_path) as server:
        yield server


@pytest.mark.timeout(400)
def test_a_lora_is_trained_delivered_and_used_by_its_url(
    orchestrator: Orchestrator, make_node, results: ResultsServer, tmp_path: Path
) -> None:
    node: Node = make_node(env={"ORCHESTRATOR_BASE_URL": results.origin})
    training = {
        "taskType": "lora_sft",
        "model": {"source": {"type": "huggingface", "identifier": "builtin:tiny-llama"}},
        "data": {"prompts": ADAPTER_ROWS * 4},
        "training": {"max_steps": 8, "batch_size": 4, "learning_rate": 0.01, "logging_steps": 2},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "output": {"destination": {"type": "http"}},
    }
    end = orchestrator.run("w1", training, 200, task_id="train")
    assert end["type"] == "TASK_SUCCEEDED", end
    trained = results.results["train"]
    assert trained["training_successful"] is True
    assert trained["final_lora_archive_uploaded"] is True
    url = trained["final_lora_archive_url"]
    assert url == f"{results.origin}/api/v1/results/train/files/final_lora.tar.gz"
    with tarfile.open(tmp_path / "train" / "final_lora.tar.gz") as archive:
        assert {name.split("/")[0] for name in archive.getnames()} == {"final_lora"}
        assert "final_lora/adapter_config.json" in archive.getnames()

    def inference(**model: object) -> dict:
        source = {"source": {"type": "huggingface", "identifier": "builtin:tiny-llama"}}
        return {
            "taskType": "inference",
            "engine": "transformers",
            "enforce_cpu": True,
            "model": {**source, "transformers": {"dtype": "float32"}, **model},
            "data": {"type": "list", "items": ["the red box holds", "the blue box holds"]},
            "inference": {"temperature": 0, "max_tokens": 8},
        }

    adapter = {"type": "lora", "name": "nails", "url": url}
    used = orchestrator.run("w1", inference(adapters=[adapter]), 120, task_id="with")
    assert used["type"] == "TASK_SUCCEEDED", used
    plain = orchestrator.run("w1", inference(), 120, task_id="without")
    assert plain["type"] == "TASK_SUCCEEDED", plain
    outputs = {task: [item["output"] for item in node.result(task)["items"]] for task in ("with", "without")}
    assert outputs["with"] != outputs["without"]
