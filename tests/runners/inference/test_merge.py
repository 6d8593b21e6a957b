"""Merged tasks and exports: each child as if it had run alone, and what cannot run fails alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")
from runners.api import BadRequest
from runners.inference.runner import InferenceRunner
from tests.kit.inference_specs import change, mixed_prompts, outputs, spec_of


def run(context: Any) -> dict[str, Any]:
    return InferenceRunner().run(context)


def alone(make_context: Any, spec: dict[str, Any], task_id: str) -> dict[str, Any]:
    return run(make_context(spec, task_id=task_id))


def test_children_answer_as_if_alone(tiny_llama, make_context) -> None:
    parent = spec_of(tiny_llama, mixed_prompts(3, seed=1), system_prompt="for the parent")
    one = spec_of(tiny_llama, mixed_prompts(2, seed=2), system_prompt="for the child")
    one["data"]["metadata"] = [{"n": 1}, {"n": 2}]
    one["postprocess"] = {"jsonl_export": {"path": "deep/out.jsonl", "fields": {"q": "prompt", "n": "metadata.n"}}}
    two = spec_of(tiny_llama, [[{"role": "user", "content": "hello"}]])
    children = [{"task_id": "child-1", "spec": one}, {"task_id": "child-2", "spec": two}]
    context = make_context(parent, children=children, delivers_http=True)
    result = run(context)
    expected = {name: alone(make_context, spec, name) for name, spec in (("child-1", one), ("child-2", two))}
    assert result["items"] == alone(make_context, parent, "x")["items"]
    assert list(result["children"]) == ["child-1", "child-2"]
    for name, there in expected.items():
        part = result["children"][name]
        assert part["items"] == there["items"]
        assert {**part["usage"], "latency_sec": 0} == {**there["usage"], "latency_sec": 0}
        assert part["model"] == str(tiny_llama)
    export = result["children"]["child-1"]["jsonl_export"]
    written = context.results_dir / "child-1" / "deep" / "out.jsonl"
    places = {"path": str(written), "worker_path": str(written), "relative_path": "deep/out.jsonl"}
    assert export == {**places, "record_count": 2, "fields": ["q", "n"]}
    assert [json.loads(line)["n"] for line in written.read_text().splitlines()] == [1, 2]
    assert [(each.path, each.field, each.child) for each in context.uploads] == [
        ("deep/out.jsonl", "jsonl_export", "child-1")
    ]
    assert not (context.out_dir / "deep").exists()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("inference.temperature", 0.5, r"merge_children\[0\]\.spec\.inference\.temperature: 0\.5, but the task"),
        ("inference.max_tokens", 3, r"merge_children\[0\]\.spec\.inference\.max_tokens: 3, but .* has 16"),
        ("model.source.identifier", "other/model", r"merge_children\[0\]\.spec\.model\.source: another one"),
        ("model.transformers.dtype", "bf16", r"merge_children\[0\]\.spec\.model\.transformers"),
        ("inference.tmperature", 1, r"merge_children\[0\]\.spec\.inference\.tmperature: unknown field"),
        ("data.items", [], r"merge_children\[0\]\.spec\.data\.items: empty"),
        ("data.items", ["a " * 5000], r"merge_children\[0\]\.spec\.data\.items\[0\]: the prompt has \d+ tokens"),
        ("engine", "auto", r"merge_children\[0\]\.spec\.engine: 'auto', but the task it is merged into has 'transf"),
    ],
)
def test_a_child_that_cannot_run_fails_alone(tiny_llama, make_context, path: str, value: Any, message: str) -> None:
    parent = spec_of(tiny_llama, ["a task"])
    children = [
        {"task_id": "bad", "spec": change(parent, path, value)},
        {"task_id": "good", "spec": spec_of(tiny_llama, ["the node"])},
    ]
    result = run(make_context(parent, children=children))
    import re

    assert re.search(message, result["children"]["bad"]["error"]), result["children"]["bad"]["error"]
    assert result["children"]["bad"]["ok"] is False
    assert result["children"]["bad"]["items"] == []
    assert outputs(result["children"]["good"]) == outputs(alone(make_context, children[1]["spec"], "good"))
    assert outputs(result) == outputs(alone(make_context, parent, "x"))


@pytest.mark.parametrize("task_id", ["../x", "", None, "task-1"])
def test_a_child_without_a_place_for_its_result(tiny_llama, make_context, task_id: Any) -> None:
    parent = spec_of(tiny_llama, ["a task"])
    with pytest.raises(BadRequest, match=r"merge_children\[0\]\.task_id: "):
        run(make_context(parent, children=[{"task_id": task_id, "spec": parent}]))


def export(make_context: Any, model: Any, wanted: dict[str, Any], metadata: list[Any] | None = None) -> list[Any]:
    spec = spec_of(model, ["a task", "the node"], max_tokens=2)
    if metadata is not None:
        spec["data"]["metadata"] = metadata
    spec["postprocess"] = {"jsonl_export": wanted}
    context = make_context(spec)
    result = run(context)
    path = context.out_dir / result["jsonl_export"]["relative_path"]
    assert result["jsonl_export"]["path"] == str(path)
    assert result["jsonl_export"]["record_count"] == 2
    assert {each.name for each in path.parent.iterdir()} - {"rows.jsonl"} == {path.name}
    return [json.loads(line) for line in path.read_text().removesuffix("\n").split("\n")]


def test_export_by_default(tiny_llama, make_context) -> None:
    spec = spec_of(tiny_llama, ["a task", "the node"], max_tokens=2)
    answers = outputs(run(make_context(spec)))
    records = export(make_context, tiny_llama, {})
    assert records == [{"prompt": "a task", "output": answers[0]}, {"prompt": "the node", "output": answers[1]}]


def test_export_fields(tiny_llama, make_context) -> None:
    fields = {
        "question": "prompt",
        "topic": "metadata.topic",
        "deep": {"from": "metadata", "key": "a.b[1]", "fallback": "metadata.topic"},
        "why": "item.finish_reason",
        "number": {"from": "item", "key": "index"},
        "all": "metadata",
        "source": "made by a test",
        "version": {"from": "literal", "value": {"major": 1}},
        "chain": {"from": "metadata", "key": "x", "fallback": {"from": "metadata", "key": "y", "default": "last"}},
        "three": 3,
        "none": "metadata.nothing",
    }
    metadata = [{"topic": "t0", "a": {"b": [1, 2]}}, {"topic": "t1", "y": "why"}]
    records = export(make_context, tiny_llama, {"path": "x/y.jsonl", "fields": fields}, metadata)
    assert list(records[0]) == list(fields)
    shown = [{name: record[name] for name in record if name not in ("all", "question")} for record in records]
    assert shown == [
        {"topic": "t0", "deep": 2, "why": "length", "number": 0, "source": "made by a test", "version": {"major": 1},
         "chain": "last", "three": 3, "none": None},
        {"topic": "t1", "deep": "t1", "why": "length", "number": 1, "source": "made by a test",
         "version": {"major": 1}, "chain": "why", "three": 3, "none": None},
    ]  # fmt: skip
    assert records[1]["all"].items() >= metadata[1].items()


def test_what_answers_have_by_request_may_be_required(tiny_llama, make_context) -> None:
    spec = spec_of(tiny_llama, ["a task"], max_tokens=2, temperature=1.0, n=2, logprobs=1)
    fields = {"first": "item.logprobs", "other": "item.outputs[1].output", "its": "item.outputs[1].logprobs"}
    spec["postprocess"] = {"jsonl_export": {"fields": fields, "required_fields": list(fields)}}
    context = make_context(spec)
    (item,) = run(context)["items"]
    record = json.loads((context.out_dir / "export.jsonl").read_text())
    assert record == {
        "first": item["logprobs"],
        "other": item["outputs"][1]["output"],
        "its": item["outputs"][1]["logprobs"],
    }
    spec["postprocess"]["jsonl_export"]["fields"]["its"] = "item.outputs[2].output"
    with pytest.raises(BadRequest, match=r"required_fields: item 0 has no 'its'"):
        run(make_context(spec))


def test_an_export_is_json_whatever_the_metadata_holds(tiny_llama, make_context) -> None:
    metadata = [{"x": float("nan")}, {"x": "𝔘\u2028"}]
    records = export(make_context, tiny_llama, {"fields": {"x": "metadata.x"}}, metadata)
    assert records == [{"x": None}, {"x": "𝔘\u2028"}]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"path": "/etc/x"}, r"jsonl_export\.path: a path below the task's folder"),
        ({"path": "../x"}, r"jsonl_export\.path: a path below the task's folder"),
        ({"path": "a/../../x"}, r"jsonl_export\.path: a path below the task's folder"),
        ({"path": "responses.json"}, r"jsonl_export\.path: 'responses\.json' is the node's own"),
        ({"path": "logs/x"}, r"jsonl_export\.path: 'logs' is the node's own"),
        ({"path": "artifacts/"}, r"jsonl_export\.path: a path below the task's folder"),
        ({"path": "artifacts"}, r"jsonl_export\.path: 'artifacts' is a folder; .* such as artifacts/export\.jsonl"),
        ({"fields": {"a": {"from": "promt"}}}, r"jsonl_export\.fields\.a\.from: .*promt"),
        ({"fields": {"a": {"key": "b"}}}, r"jsonl_export\.fields\.a\.from: missing"),
        ({"fields": {"a": {"from": "output", "key": "b"}}}, r"fields\.a\.key: 'output' is one text"),
        ({"fields": {"a": {"from": "output", "value": "b"}}}, r"fields\.a\.value: only a field from 'literal'"),
        ({"fields": {"a": "metadata.b[x]"}}, r"fields\.a: .* is no path"),
        ({"required_fields": ["c"]}, r"required_fields\[0\]: 'c' is none of the fields \(prompt, output\)"),
        ({"pth": "x"}, r"jsonl_export\.pth: unknown field; did you mean 'path'"),
        (
            {"fields": {"t": "metadata.topic"}, "required_fields": ["t"]},
            r"jsonl_export\.required_fields: item 1 has no 't': metadata has no 'topic'",
        ),
    ],
)
def test_bad_exports_fail_before_anything_is_computed(make_context, wanted: dict[str, Any], message: str) -> None:
    spec = spec_of("/no/such/model", ["a", "b"])
    spec["data"]["metadata"] = [{"topic": 1}, {}]
    spec["postprocess"] = {"jsonl_export": wanted}
    with pytest.raises(BadRequest, match=message):
        run(make_context(spec))


def test_a_graph_prompt_takes_the_system_prompt_before_or_behind(tiny_llama, make_context) -> None:
    spec = spec_of(tiny_llama, [], system_prompt="be brief", max_tokens=2)
    spec["_upstreamResults"] = {"one": {"items": [{"output": "text"}]}}
    template = {"text": "{col0_value}", "columns": [{"label": "x", "expr": "one.result.items[0].output"}]}
    spec["data"] = {"type": "graph_template", "template": template}
    assert run(make_context(spec))["items"][0]["prompt"] == "be brief\ntext"
    spec["data"]["template"] = {**template, "append_system_prompt": True}
    assert run(make_context(spec))["items"][0]["prompt"] == "text\nbe brief"


def test_a_shard_with_no_rows_is_an_empty_success(tiny_llama, make_context) -> None:
    spec = spec_of(tiny_llama, ["a", "b"])
    spec["shard"] = {"index": 2, "total": 3}
    result = run(make_context(spec))
    assert (result["ok"], result["items"], result["usage"]["num_requests"]) == (True, [], 0)
