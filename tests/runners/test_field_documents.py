"""Documents of the field, as an orchestrator sends them: each runs to its end; its result says what was not used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowmesh.messages.job import Fault, Outcome
from runners import child
from runners.api import Context
from runners.data import download
from tests.kit.training_tasks import train

Make = Callable[..., Context]

DPO = """
model:
  source: {type: huggingface, identifier: "builtin:tiny-llama", revision: main, trust_remote_code: false}
  config: {fp16: false, device_map_auto: true}
data:
  notes: for the person who reads this
  preferences:
    - {prompt: "Is the queue free?", chosen: " Yes.", rejected: " Who knows."}
    - {prompt: "Is a slot free?", chosen: " Yes.", rejected: " Ask later."}
training: {max_steps: 2, batch_size: 2, early_stopping: true, optimize_cuda_cache: true, log_with: null,
           tracker_project_name: demo, save_model: false, save_strategy: "no"}
output: {destination: {type: local, path: "./"}, artifacts: [responses.json]}
"""
PPO = """
model: {source: {identifier: "builtin:tiny-llama"}}
data: {prompts: ["Is the queue free?", "Is a slot free?", "Is the node free?", "Is one GPU free?"]}
reward: {function: length}
training: {steps: 1, batch_size: 4, mini_batch_size: 1, gradient_accumulation_steps: 4, ppo_epochs: 1,
           save_model: false}
generation: {max_new_tokens: 4, min_length: -1, top_k: 0.0, top_p: 1.0, do_sample: true}
"""
SFT = """
model: {source: {identifier: "builtin:tiny-llama"}, vllm: {max_model_len: 512}, transformers: {dtype: auto}}
inference: {max_tokens: 16}
parallel: {enabled: false}
data: {prompts: ["the node waits", "a slot returns"]}
training: {max_steps: 1, batch_size: 2, save_model: false, save_strategy: "no"}
"""
EXPORT = """
model: {source: {identifier: "builtin:tiny-llama"}}
data: {type: list, items: ["the node waits", "a slot returns"],
       items_metadata: [{reference_answer: one}, {reference_answer: two}]}
inference: {temperature: 0, max_tokens: 6, system_prompt: "Be brief."}
postprocess:
  jsonl_export:
    path: train.jsonl
    required_fields: [prompt, response]
    fields: {prompt: {from: metadata, key: prompt}, response: {from: output}, reference: "metadata.reference_answer"}
"""
GRAPH = """
model: {source: {identifier: "builtin:tiny-llama"}}
_upstreamResults: {branch-a: {result: {items: [{output: "less smoke"}]}},
                   branch-b: {result: {items: [{output: "cables"}]}}}
data:
  type: graph_template
  template:
    name: two_column_briefing
    options: {role: analyst, intro: ["You see two findings.", "Weigh them."],
              closing: ["Answer in one sentence.", "Name a number."]}
    columns: [{label: Benefits, node: branch-a, path: "result.items[0].output"},
              {label: Challenges, node: branch-b, path: "result.items[0].output"}]
inference: {temperature: 0, max_tokens: 8}
"""
LORA = """
model:
  source: {identifier: "builtin:tiny-llama"}
  adapters: [{type: lora, name: tuned, path: /shared/not/here/final_lora, taskId: a-task-of-another-node,
              url: "http://127.0.0.1:9/api/v1/results/a-task/files/final_lora.tar.gz"}]
data: {type: list, items: ["the node waits"]}
inference: {temperature: 0, max_tokens: 6}
"""


def document(text: str, **changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load(text), **changes}


@pytest.mark.parametrize(
    ("task_type", "text", "named"),
    [
        ("dpo", DPO, ["spec.model.config", "spec.data.notes", "spec.training.early_stopping",
                      "spec.training.optimize_cuda_cache", "spec.training.log_with",
                      "spec.training.tracker_project_name"]),
        ("ppo", PPO, ["spec.generation.min_length", "spec.generation.top_k", "spec.generation.top_p"]),
        ("sft", SFT, ["spec.model.vllm", "spec.inference", "spec.parallel"]),
    ],
)  # fmt: skip
def test_training(tmp_path: Path, task_type: str, text: str, named: list[str]) -> None:
    pytest.importorskip("trl", reason="needs the extra 'training'")
    result = train(tmp_path, task_type, document(text))
    assert result["training_successful"] is True
    (warning,) = [each for each in result["warnings"] if each.startswith("fields not used")]
    assert sorted(warning.removeprefix("fields not used: ").split(", ")) == sorted(named)
    assert any("mini_batch_size: read as" in each for each in result["warnings"]) is (task_type == "ppo")


def infer(make_context: Make, text: str) -> tuple[Outcome, Context]:
    pytest.importorskip("transformers", reason="needs the extra 'inference'")
    ctx = make_context(document(text), runner="runners.inference.runner:InferenceRunner")
    return child.run(ctx.job, ctx), ctx


def test_answers_are_exported_and_trained_on(make_context: Make, tmp_path: Path) -> None:
    outcome, ctx = infer(make_context, EXPORT)
    assert outcome.result is not None
    assert "warnings" not in outcome.result
    lines = [json.loads(line) for line in (ctx.out_dir / "train.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["reference"]) for line in lines] == [
        ("the node waits", "one"),
        ("a slot returns", "two"),
    ]
    pytest.importorskip("trl", reason="needs the extra 'training'")
    later = {
        "jsonl": {"path": str(ctx.out_dir / "train.jsonl"), "prompt_field": "prompt", "response_field": "response"}
    }
    result = train(tmp_path, "sft", document(SFT, data=later))
    assert result["dataset_size"] == 2


def test_a_graph_with_lines(make_context: Make) -> None:
    outcome, _ = infer(make_context, GRAPH)
    assert outcome.result is not None
    (item,) = outcome.result["items"]
    assert item["prompt"].splitlines()[:3] == ["You are analyst.", "You see two findings.", "Weigh them."]
    assert item["prompt"].splitlines()[-2:] == ["Answer in one sentence.", "Name a number."]


def test_an_adapter_of_three_places_is_fetched_last(make_context: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    outcome, _ = infer(make_context, LORA)
    assert outcome.fault is Fault.ERROR, "no fault of the document"
    assert outcome.message.startswith("spec.model.adapters[0].url: ")
