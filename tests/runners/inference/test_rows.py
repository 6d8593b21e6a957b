"""The row log of inference: what is computed stays, and a retry computes only what is missing."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from flowmesh.messages.rows import read
from runners.api import BadRequest, Cancelled, Context
from runners.inference.runner import InferenceRunner
from tests.kit.inference_specs import change, mixed_prompts, spec_of

pytest.importorskip("transformers", reason="needs the extra 'inference'")


def kept(context: Context, name: str = "rows.jsonl") -> Any:
    with (context.out_dir / name).open("rb") as file:
        return read(file)


def cancel_at(context: Context, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the task when so many prompts are answered, as a cancel frame does."""
    report = context.progress

    def progress(at: float, total: float | None = None, unit: str = "", **metrics: float) -> None:
        if at >= done:
            raise Cancelled
        report(at, total, unit, **metrics)

    monkeypatch.setattr(context, "progress", progress)


def without_time(result: dict[str, Any]) -> dict[str, Any]:
    usage = {name: value for name, value in result["usage"].items() if name != "latency_sec"}
    return {name: value for name, value in result.items() if name not in ("rows", "usage")} | {"usage": usage}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches, so that rows finish at different times."""
    monkeypatch.setattr("runners.inference.loader.CPU_ROWS", 4)


@pytest.fixture
def whole(tiny_llama, make_context) -> dict[str, Any]:
    """An undisturbed run of `spec`."""
    spec = spec_of(tiny_llama, [*mixed_prompts(20, 8), "twice", "twice"], max_tokens=6, stop=["the"])
    return {"spec": spec, "result": InferenceRunner().run(make_context(spec, task_id="undisturbed"))}


def test_a_cancelled_task_goes_on(whole, make_context, monkeypatch) -> None:
    first = make_context(whole["spec"])
    cancel_at(first, 7, monkeypatch)
    with pytest.raises(Cancelled):
        InferenceRunner().run(first)
    assert first.rows is not None
    assert 7 <= first.rows.done < first.rows.total == 22
    before = kept(first)
    assert before.counts.done == first.rows.done
    by_index = {item["index"]: item for item in whole["result"]["items"]}
    assert all(row.item == by_index[index] for index, row in before.current.items())
    again = make_context(whole["spec"], anew=False)
    result = InferenceRunner().run(again)
    assert without_time(result) == without_time(whole["result"])
    assert result["rows"]["reused"] == first.rows.done
    assert again.rows is not None
    after = kept(again)
    assert (len(after.rows), after.counts.done, again.rows.done) == (22, 22, 22)
    assert after.rows[: first.rows.done] == before.rows, "what stood was written again"


def test_a_whole_log_needs_no_model(whole, make_context, monkeypatch) -> None:
    first = make_context(whole["spec"])
    InferenceRunner().run(first)
    monkeypatch.setattr("runners.inference.runner.load_engine", None)
    result = InferenceRunner().run(make_context(whole["spec"], anew=False))
    assert without_time(result) == without_time(whole["result"])
    with pytest.raises(TypeError):
        InferenceRunner().run(make_context(whole["spec"] | {"resume": False}, anew=False))


def test_torn_and_changed_lines_are_computed_again(whole, make_context) -> None:
    first = make_context(whole["spec"])
    InferenceRunner().run(first)
    path = first.out_dir / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b'"index":', b'"indeX":')
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    result = InferenceRunner().run(make_context(whole["spec"], anew=False))
    assert result["rows"]["reused"] == 20
    assert without_time(result) == without_time(whole["result"])
    assert kept(first).bad_lines == 0


def test_another_document_has_other_rows(tiny_llama, make_context) -> None:
    changes = {
        "inference.max_tokens": 3, "inference.system_prompt": "Be brief.", "inference.temperature": 0.5,
        "model.transformers.dtype": "bfloat16",
    }  # fmt: skip
    spec = spec_of(tiny_llama, ["a task"], max_tokens=2)
    context = make_context(spec)
    InferenceRunner().run(context)
    for count, (path, value) in enumerate(changes.items(), 2):
        assert "rows" not in InferenceRunner().run(make_context(change(spec, path, value), anew=False)), path
        assert (kept(context).counts.done, len(kept(context).rows)) == (1, count)
    assert InferenceRunner().run(make_context(spec, anew=False))["rows"]["reused"] == 1, "old rows are lost"


def test_other_weights_under_the_same_name_have_other_rows(tiny_llama, tmp_path, make_context) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    spec = spec_of(model, ["a task", "starts"])
    InferenceRunner().run(make_context(spec))
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    changed.save_pretrained(model)
    assert "rows" not in InferenceRunner().run(make_context(spec, anew=False))


@pytest.mark.parametrize("how", ["taskId", "path"])
def test_rows_of_another_task(how, whole, make_context) -> None:
    first = make_context(whole["spec"], task_id="earlier")
    InferenceRunner().run(first)
    items = ["new one", *reversed(whole["spec"]["data"]["items"])]
    resume = {"taskId": "earlier"} if how == "taskId" else {"path": str(first.out_dir / "rows.jsonl")}
    context = make_context(change(whole["spec"], "data.items", items) | {"resume": resume}, task_id="later")
    result = InferenceRunner().run(context)
    assert result["rows"]["reused"] == 22
    assert [item["index"] for item in result["items"]] == list(range(23))
    answers = {json.dumps(item["prompt"]): item["output"] for item in whole["result"]["items"]}
    assert all(answers[json.dumps(item["prompt"])] == item["output"] for item in result["items"][1:])


@pytest.mark.parametrize(
    ("resume", "error"),
    [({"taskId": "nobody"}, r"spec\.resume\.taskId: this node has no results of task 'nobody'"),
     ({"path": "/nowhere"}, r"spec\.resume\.path: '/nowhere' has no rows\.jsonl"),
     ({"path": "/a", "url": "http://b"}, r"spec\.resume: give exactly one of")],
)  # fmt: skip
def test_what_cannot_be_resumed_is_refused(resume, error, tiny_llama, make_context) -> None:
    with pytest.raises(BadRequest, match=error):
        InferenceRunner().run(make_context(spec_of(tiny_llama, ["a"]) | {"resume": resume}))


def test_sampled_rows_are_the_same_whenever_they_are_computed(tiny_llama, make_context, monkeypatch) -> None:
    spec = spec_of(tiny_llama, mixed_prompts(8, 5), temperature=1.0, seed=7, n=2, max_tokens=5)
    whole = InferenceRunner().run(make_context(spec, task_id="undisturbed"))
    first = make_context(spec)
    cancel_at(first, 3, monkeypatch)
    with pytest.raises(Cancelled):
        InferenceRunner().run(first)
    assert without_time(InferenceRunner().run(make_context(spec, anew=False))) == without_time(whole)


def test_merged_children_have_logs_of_their_own(tiny_llama, make_context, tmp_path) -> None:
    spec = spec_of(tiny_llama, ["a task"], max_tokens=4)
    children = [{"task_id": "c1", "spec": change(spec, "data.items", ["starts", "ends"])}]
    folders = {"c1": str(tmp_path / "results" / "c1")}
    context = make_context(spec, children=children, child_dirs=folders)
    result = InferenceRunner().run(context)
    assert context.rows is not None
    assert (context.rows.done, context.rows.total) == (3, 3)
    alone = make_context(children[0]["spec"], task_id="c1", anew=False)
    assert InferenceRunner().run(alone)["items"] == result["children"]["c1"]["items"]
    assert alone.rows is not None
    assert alone.rows.reused == 2
