"""The common workflow: train, deliver over HTTP or to S3, and run inference with the result by URL."""

from __future__ import annotations

import importlib.util
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.results_server import ResultsServer
from tests.kit.s3_server import KEYS, S3Server, s3_server
from tests.kit.support import Node, Orchestrator

pytestmark = [
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the training extra"),
    pytest.mark.skipif(importlib.util.find_spec("moto") is None, reason="needs moto"),
]
CLOUD = """
[cloud]
read = ["s3://source", "s3://out"]
write = ["s3://out/team"]
endpoint_url = "{url}"
credentials_file = "{file}"
"""
ADAPTER_ROWS = [f"the {colour} box holds {number} nails" for colour in ("red", "blue") for number in ("two", "nine")]


@pytest.fixture
def results(tmp_path: Path) -> Iterator[ResultsServer]:
    with ResultsServer(tmp_path) as server:
        yield server


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.mark.timeout(400)
def test_a_lora_is_trained_delivered_and_used_by_its_url(
    orchestrator: Orchestrator, make_node, results: ResultsServer, s3: S3Server, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text("[default]\n" + "".join(f"{name} = {KEYS[name]}\n" for name in KEYS))
    cloud = CLOUD.format(url=s3.url, file=tmp_path / "credentials")
    node: Node = make_node(config=cloud, env={"ORCHESTRATOR_BASE_URL": results.origin})
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
    over_s3(orchestrator, node, s3)
    for log in (node.log, *node.state_dir.glob("log/*.log")):
        assert KEYS["aws_secret_access_key"] not in log.read_text()


def over_s3(orchestrator: Orchestrator, node: Node, server: S3Server) -> None:
    """The same with data, model and results in S3, on the same node: its libraries take long to import."""
    server.put("source", {"rows.jsonl": b"".join(b'{"prompt": "%b"}\n' % row.encode() for row in ADAPTER_ROWS)})
    server.put("out", {})
    training = {
        "taskType": "sft",
        "model": {"source": {"type": "huggingface", "identifier": "builtin:tiny-llama"}},
        "data": {"jsonl": {"path": "s3://source/rows.jsonl", "text_field": "prompt"}},
        "training": {"max_steps": 2, "batch_size": 2, "learning_rate": 0.01},
        "output": {"destination": {"type": "s3", "url": "s3://out/team"}},
    }
    end = orchestrator.run("w1", training, 200, task_id="s3-train")
    assert end["type"] == "TASK_SUCCEEDED", end
    trained = json.loads(server.get("out", "team/s3-train.json"))["result"]
    assert trained == node.result("s3-train")
    url = trained["final_model_archive_url"]
    assert url == "s3://out/team/s3-train/final_model.tar.gz"
    assert server.uploads("out") == []
    inference = {
        "taskType": "inference",
        "engine": "transformers",
        "enforce_cpu": True,
        "model": {"transformers": {"dtype": "float32"}},
        "checkpoint": {"load": {"url": url}},
        "data": {"type": "jsonl", "path": "s3://source/rows.jsonl", "column": "prompt"},
        "inference": {"temperature": 0, "max_tokens": 4},
        "output": {"destination": {"type": "s3", "url": "s3://out/team/used"}, "artifacts": ["responses.json"]},
    }
    end = orchestrator.run("w1", inference, 120, task_id="use")
    assert end["type"] == "TASK_SUCCEEDED", end
    assert len(json.loads(server.get("out", "team/used/use.json"))["result"]["items"]) == len(ADAPTER_ROWS)
    assert sorted(server.keys("out"))[-2:] == ["team/used/use.json", "team/used/use/responses.json"]
    folder = node.results_dir / "s3-train" / "final_model"
    server.put("source", {f"model/{each.name}": each.read_bytes() for each in folder.iterdir()})
    model = {**inference["model"], "source": {"type": "huggingface", "identifier": "s3://source/model/"}}
    by_folder = {each: value for each, value in inference.items() if each != "checkpoint"} | {"model": model}
    end = orchestrator.run("w1", by_folder, 120, task_id="folder")
    assert end["type"] == "TASK_SUCCEEDED", end
    assert outputs_of(node, "folder") == outputs_of(node, "use")
    outside = {**inference, "output": {"destination": {"type": "s3", "url": "s3://out/other"}}}
    end = orchestrator.run("w1", outside, 60, task_id="outside")
    assert end["error"].startswith("spec.output.destination.url: s3://out/other: the operator does not allow")


def outputs_of(node: Node, task_id: str) -> list[str]:
    return [item["output"] for item in node.result(task_id)["items"]]
