"""Metadata of items, and adapters that a document names at several places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")

from runners.api import BadRequest, RunnerError
from runners.data import download
from runners.inference.runner import InferenceRunner
from runners.models.builtin import write_tiny_lora
from tests.kit.inference_specs import outputs, spec_of


def items(context: Any) -> list[dict[str, Any]]:
    return list(InferenceRunner().run(context)["items"])


def test_metadata_has_the_prompt_as_given_and_as_rendered(tiny_llama, make_context) -> None:
    spec = spec_of(tiny_llama, ["the node waits", "a slot returns"], max_tokens=2, system_prompt="Be brief.")
    spec["data"]["metadata"] = [{"id": 7}, None]
    first, second = items(make_context(spec))
    assert first["metadata"] == {"prompt": "the node waits", "rendered_prompt": "Be brief.\nthe node waits", "id": 7}
    assert second["metadata"]["prompt"] == "a slot returns"
    assert first["prompt"] == "Be brief.\nthe node waits"


def test_a_rows_own_prompt_stays(tiny_llama, make_context) -> None:
    spec = spec_of(tiny_llama, ["the node waits"], max_tokens=2)
    spec["data"]["metadata"] = [{"prompt": "mine"}]
    assert items(make_context(spec))[0]["metadata"] == {"prompt": "mine", "rendered_prompt": "the node waits"}


def test_a_chat_is_rendered_by_the_template(tiny_llama, reference, make_context) -> None:
    turns = [{"role": "user", "content": "Is the queue free?"}]
    spec = spec_of(tiny_llama, [turns], max_tokens=2)
    found = items(make_context(spec))[0]["metadata"]
    wanted = reference[1].apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert found == {"prompt": turns, "rendered_prompt": wanted}


def test_an_export_reads_the_prompt_as_a_later_stage_wants_it(tiny_llama, make_context) -> None:
    spec = spec_of(tiny_llama, ["the node waits"], max_tokens=2, system_prompt="Be brief.")
    spec["postprocess"] = {
        "jsonl_export": {
            "path": "train.jsonl",
            "required_fields": ["prompt", "rendered", "response"],
            "fields": {"prompt": {"from": "metadata", "key": "prompt"}, "rendered": "metadata.rendered_prompt",
                       "response": {"from": "output"}},
        }
    }  # fmt: skip
    context = make_context(spec)
    result = InferenceRunner().run(context)
    (line,) = map(json.loads, (context.out_dir / "train.jsonl").read_text().splitlines())
    assert line == {
        "prompt": "the node waits",
        "rendered": "Be brief.\nthe node waits",
        "response": result["items"][0]["output"],
    }


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return written(tmp_path / "lora", seed=1)


def written(folder: Path, *, seed: int) -> Path:
    folder.mkdir(parents=True)
    write_tiny_lora(folder, seed=seed)
    return folder


NOWHERE = "http://127.0.0.1:9/api/v1/results/a-task/files/final_lora.tar.gz"


def adapted(model: Path, **adapter: Any) -> dict[str, Any]:
    spec = spec_of(model, ["the node waits"], max_tokens=6)
    spec["model"]["adapters"] = [{"type": "lora", "name": "tuned", **adapter}]
    return spec


def test_an_adapter_is_taken_from_the_first_place_that_has_it(tiny_llama, lora, make_context, tmp_path) -> None:
    base = outputs(InferenceRunner().run(make_context(spec_of(tiny_llama, ["the node waits"], max_tokens=6))))
    written(tmp_path / "results" / "made" / "final_lora", seed=2)

    def answers(**adapter: Any) -> list[str]:
        return outputs(InferenceRunner().run(make_context(adapted(tiny_llama, **adapter), task_id="t")))

    of_path, of_task = answers(path=str(lora)), answers(taskId="made")
    assert base != of_path != of_task
    assert answers(path=str(lora), taskId="made", url=NOWHERE) == of_path
    assert answers(path="/no/such/final_lora", taskId="made", url=NOWHERE) == of_task


def test_the_last_place_is_the_download(tiny_llama, make_context, monkeypatch) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    spec = adapted(tiny_llama, path="/no/such/final_lora", taskId="of-another-node", url=NOWHERE)
    with pytest.raises(RunnerError, match=r"adapters\[0\]\.url: .*127\.0\.0\.1:9"):
        InferenceRunner().run(make_context(spec))


def test_a_task_of_another_node_is_looked_for_where_this_tasks_results_go(
    tiny_llama, make_context, monkeypatch
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    url = "http://127.0.0.1:9/api/v1/results/task-1/files/{name}"
    spec = adapted(tiny_llama, taskId="of-another-node")
    with pytest.raises(RunnerError, match=r"adapters\[0\]\.taskId: .*127\.0\.0\.1:9"):
        InferenceRunner().run(make_context(spec, file_url=url))
    with pytest.raises(BadRequest, match=r"adapters\[0\]\.path: there is no '/no/x'.*; .*taskId: this node has no"):
        InferenceRunner().run(make_context(adapted(tiny_llama, path="/no/x", taskId="of-another-node")))


@pytest.mark.parametrize("apply", ["runtime", "merge"])
def test_an_adapters_end_tokens_end_its_answers(tiny_llama, reference, lora, make_context, apply: str) -> None:
    adapters = [{"name": "tuned", "path": str(lora), "apply": apply}]
    spec = spec_of(tiny_llama, ["the node waits"], max_tokens=12, logprobs=0)
    spec["model"]["adapters"] = adapters
    (whole,) = items(make_context(spec))
    ids = [each["token_id"] for each in whole["logprobs"]]
    end = next(i for i, token_id in enumerate(ids) if i > 1 and token_id not in ids[:i])
    (lora / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, ids[end]]}))
    (ended,) = items(make_context(spec))
    assert [each["token_id"] for each in ended["logprobs"]] == ids[: end + 1]
    assert (whole["finish_reason"], ended["finish_reason"]) == ("length", "stop")
    (ignored,) = items(make_context({**spec, "inference": {**spec["inference"], "ignore_eos": True}}))
    assert ignored["output"] == whole["output"]
    if apply == "runtime":  # the base model's answers end as they did
        base = {**spec, "model": {**spec["model"], "adapters": [*adapters, {"name": "other", "path": str(lora)}]}}
        base["data"] = {**spec["data"], "metadata": [{"adapter": "base"}]}
        plain = items(make_context(spec_of(tiny_llama, ["the node waits"], max_tokens=12)))
        assert outputs(InferenceRunner().run(make_context(base))) == [plain[0]["output"]]
