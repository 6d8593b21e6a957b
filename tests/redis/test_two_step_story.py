"""The common workflow: train a LoRA, deliver it over HTTP, and run inference with it by URL."""

from __future__ import annotations

import email.parser
import email.policy
import importlib.util
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.fake_http import FakeHandler, FakeServer
from tests.kit.support import Node, Orchestrator

pytestmark = [
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the training extra"),
]
ADAPTER_ROWS = [f"the {colour} box holds {number} nails" for colour in ("red", "blue") for number in ("two", "nine")]


class ResultsServer(FakeServer):
    """The orchestrator's HTTP side, from docs/contract.md §2: takes results and files, and gives files back."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_Handler)
        self.folder = folder
        self.results: dict[str, dict] = {}


class _Handler(FakeHandler):
    server: ResultsServer

    def do_POST(self) -> None:
        body = self.body()
        parts = self.path.strip("/").split("/")
        assert parts[:3] == ["api", "v1", "results"]
        if parts[3:] == []:
            message = json.loads(body)
            self.server.results[message["task_id"]] = message["result"]
        else:
            assert parts[4:] == ["files"]
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
            (part,) = form.iter_parts()
            assert part.get_param("name", header="content-disposition") == "file"
            target = self.server.folder / parts[3]
            target.mkdir(exist_ok=True)
            (target / Path(part.get_filename() or "").name).write_bytes(part.get_payload(decode=True))
        self.answer(200, b"{}")

    def do_GET(self) -> None:
        _, _, _, task_id, _, name = self.path.strip("/").split("/")
        path = self.server.folder / task_id / name
        self.answer(*((200, path.read_bytes()) if path.is_file() else (404, b"no such file")))


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
