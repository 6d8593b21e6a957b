"""Unknown fields, by one rule in every runner: refused, all at once, or not used and named in one warning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flowmesh.messages.job import Fault, Outcome
from runners import child
from runners.api import Context
from runners.training.plan import read

MODEL = {"source": {"identifier": "builtin:tiny-llama"}}
LISTED = {"type": "list", "items": ["the node waits"]}
ECHO = "runners.echo:EchoRunner"
INFERENCE = "runners.inference.runner:InferenceRunner"
RAG = "runners.rag.runner:RagRunner"
AGENT = "runners.agent.runner:AgentRunner"
TRAINING = {"sft": "Sft", "lora_sft": "LoraSft", "dpo": "Dpo", "ppo": "Ppo", "grpo": "Grpo", "rloo": "Rloo",
            "kto": "Kto", "reward": "Reward"}  # fmt: skip
Make = Callable[..., Context]


def run(make_context: Make, runner: str, spec: dict[str, Any], **fields: Any) -> Outcome:
    ctx = make_context(spec, runner=runner, **fields)
    return child.run(ctx.job, ctx)


def faults(outcome: Outcome) -> str:
    assert outcome.fault is Fault.BAD_REQUEST, outcome
    return outcome.message


WRONG: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        INFERENCE,
        {"model": {"sorce": {}}, "inference": {"temprature": 1, "top_p": 7}, "data": {**LISTED, "itemz": []},
         "postprocess": {"jsonl": {}}, "shard": {"indx": 0, "total": 2}, "chekpoint": {}, "max_tokens": 3},
        ["spec.model.sorce", "spec.inference.temprature", "spec.inference.top_p", "spec.data.itemz",
         "spec.postprocess.jsonl", "spec.shard.indx", "spec.chekpoint", "spec.max_tokens: unknown field; it belongs "
         "into spec.inference"],
    ),
    (
        RAG,
        {"query": "x", "faiss": {"pth": "p"}, "serch": {}, "embedding": {"modl": "m"}, "search": {"topk": 3}},
        ["spec.faiss.pth", "spec.serch", "spec.embedding.modl", "spec.search.topk"],
    ),
    (AGENT, {"task": "x", "agent": {"timout": 3}, "confgName": "c"}, ["spec.agent.timout", "spec.confgName"]),
    (ECHO, {"delay_sec": 1}, ["spec.delay_sec: unknown field; did you mean 'delaySec'?"]),
]  # fmt: skip


@pytest.mark.parametrize(("runner", "spec", "named"), WRONG, ids=["inference", "rag", "agent", "echo"])
def test_all_that_is_wrong_is_in_one_error(
    make_context: Make, runner: str, spec: dict[str, Any], named: list[str]
) -> None:
    message = faults(run(make_context, runner, spec))
    assert [each for each in named if each not in message] == []


@pytest.mark.parametrize("task_type", TRAINING)
def test_all_that_is_wrong_with_a_training_task_is_in_one_error(make_context: Make, task_type: str) -> None:
    pytest.importorskip("trl", reason="needs the extra 'training'")
    spec = {
        "model": {"source": {"identfier": "x"}, "adapters": [{}]},
        "training": {"lerning_rate": 1, "batch_size": 0, "weight_decay": 0.1, "save_steps": 2, "save_freq": 3},
        "data": {"dataset_nme": "x", "eval_split": 3},
        "lora": {"rank": 8} if task_type != "sft" else {},
        "checkpoint": {"lod": {}},
        "resources": {"hardware": {"gpu": {"coutn": 1}}},
        "learning_rate": 1,
        "seed": 3,
    }
    message = faults(run(make_context, f"runners.training.runner:{TRAINING[task_type]}Runner", spec))
    for each in (
        "spec.model.source.identfier", "spec.training.lerning_rate", "spec.training.batch_size",
        "spec.training.weight_decay", "spec.data.dataset_nme", "spec.lora", "spec.checkpoint.lod",
        "spec.resources.hardware.gpu.coutn", "spec.learning_rate: unknown field; it belongs into spec.training",
    ):  # fmt: skip
        assert each in message


UNUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        INFERENCE,
        {"model": {**MODEL, "config": {}, "vllm": {"max_model_len": 64}}, "data": {**LISTED, "notes": "n"},
         "inference": {"max_tokens": 2, "stream": False}, "training": {"max_steps": 3}, "lora": {"r": 8},
         "parallel": {"enabled": True}, "priority_class": "high", "notes": "n", "output": {"notes": "n"},
         "resources": {"replicas": 2, "hardware": {"disk": "1Gi"}}, "_private": 1},
        ["spec.output.notes", "spec.resources.replicas", "spec.resources.hardware.disk", "spec.training", "spec.lora",
         "spec.parallel", "spec.priority_class", "spec.notes", "spec.model.config", "spec.inference.stream",
         "spec.data.notes", "spec.model.vllm.max_model_len (engine transformers)"],
    ),
]  # fmt: skip


def test_what_is_not_used_is_named_in_one_warning(make_context: Make, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'inference'")
    runner, spec, named = UNUSED[0]
    outcome = run(make_context, runner, spec)
    assert outcome.ok, outcome.message
    assert outcome.result is not None
    (warning,) = outcome.result["warnings"]
    assert warning == "fields not used: " + ", ".join(named)
    assert caplog.text.count("fields not used") == 1


def test_echo_knows_the_fields_of_resources(make_context: Make) -> None:
    """A probe that asks for a GPU in a misspelt field would be taken by any worker."""
    spec = {"taskType": "echo", "resources": {"replicas": 2, "hardware": {"gpu": {"cuont": 1}, "cpuu": 2}}}
    message = faults(run(make_context, ECHO, spec))
    assert "spec.resources.hardware.gpu.cuont: unknown field; did you mean 'count'?" in message
    assert "spec.resources.hardware.cpuu: unknown field; did you mean 'cpu'?" in message
    del spec["resources"]["hardware"]  # type: ignore[attr-defined]
    outcome = run(make_context, ECHO, spec)
    assert outcome.result is not None
    assert outcome.result["warnings"] == ["fields not used: spec.resources.replicas"]


def test_fields_beside_the_spec_are_named_as_not_used(make_context: Make) -> None:
    """Where one level of indentation is missing; a peer's own fields and what people write are not mentioned."""
    ctx = make_context({"taskType": "echo"}, runner=ECHO)
    ctx.job.task.update({"timeoutSec": 5, "resources": {}, "shard": None, "status": {}, "kind": "Task", "title": "a"})
    outcome = child.run(ctx.job, ctx)
    assert outcome.result is not None
    assert outcome.result["warnings"] == ["fields not used: timeoutSec beside spec, resources beside spec"]


def test_a_merged_childs_fields_are_named_with_its_place(make_context: Make) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'inference'")
    spec = {"model": MODEL, "data": LISTED, "inference": {"max_tokens": 2}}
    other = {**spec, "data": {**LISTED, "notes": "n"}}
    outcome = run(make_context, INFERENCE, spec, children=[{"task_id": "c", "spec": other}])
    assert outcome.result is not None
    assert outcome.result["warnings"] == ["fields not used: merge_children[0].spec.data.notes"]


INHERITED = {"inference": {"max_tokens": 16}, "parallel": {"enabled": False}, "postprocess": {}, "notes": "n"}
ROWS = {
    "sft": {"prompts": ["a"]}, "lora_sft": {"prompts": ["a"]}, "ppo": {"prompts": ["a"]}, "grpo": {"prompts": ["a"]},
    "rloo": {"prompts": ["a"]}, "dpo": {"preferences": [{"prompt": "p", "chosen": "c", "rejected": "r"}]},
    "reward": {"preferences": [{"prompt": "p", "chosen": "c", "rejected": "r"}]},
    "kto": {"examples": [{"prompt": "p", "completion": "c", "label": True}]},
}  # fmt: skip


@pytest.mark.parametrize("task_type", TRAINING)
def test_training_names_inherited_blocks_and_old_fields(make_context: Make, task_type: str) -> None:
    rewarded = task_type in ("ppo", "grpo", "rloo")
    old = {"early_stopping": True, "optimize_cuda_cache": True, "log_with": None, "tracker_project_name": "demo"}
    spec = {
        "model": {**MODEL, "vllm": {"max_model_len": 9}, "transformers": {"dtype": "auto"}, "config": {"fp16": False}},
        "data": {**ROWS[task_type], "notes": "n"},
        "training": {**old, "max_steps": 1, "beta": 0.1, "early_stopping": True},
        **INHERITED,
        **({"reward": {"function": "length"}} if rewarded else {"reward": {"function": "length"}, "generation": {}}),
    }
    ctx = make_context(spec)
    read(task_type, ctx)
    for each in (
        "spec.model.vllm", "spec.model.config", "spec.data.notes", "spec.inference", "spec.parallel",
        "spec.postprocess", "spec.notes", *(f"spec.training.{name}" for name in old),
    ):  # fmt: skip
        assert each in ctx.unused, each
    assert "spec.model.transformers" not in ctx.unused
    assert ("spec.reward" in ctx.unused) is not rewarded


def test_trust_remote_code_of_the_source_is_that_of_the_engine(make_context: Make) -> None:
    from runners.inference.task import read_task

    source = {"source": {"identifier": "m", "trust_remote_code": True}}
    spec: dict[str, Any] = {"model": source, "data": ROWS["sft"]}
    found = read_task(make_context(spec), spec)
    assert (found.transformers.trust_remote_code, found.vllm["trust_remote_code"]) == (True, True)
    assert read("sft", make_context(spec)).model.transformers.trust_remote_code is True
    own = {**spec, "model": {**source, "transformers": {"trust_remote_code": False}}}
    found = read_task(make_context(own), own)
    assert found.transformers.trust_remote_code is False
    assert "trust_remote_code" not in found.vllm
    assert read("sft", make_context(own)).model.transformers.trust_remote_code is False


def test_echo_returns_what_it_does_not_know(make_context: Make) -> None:
    outcome = run(make_context, ECHO, {"notes": "n", "x": 1})
    assert outcome.result == {"ok": True, "echo": {"notes": "n", "x": 1}}
