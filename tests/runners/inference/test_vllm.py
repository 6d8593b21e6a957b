"""The inference runner on vLLM: the same answers as Transformers, and vLLM's own ways to fail.

Each engine starts in a process of its own that a server forked, as on a node: vLLM changes its process for good.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import signal
from base64 import b64encode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
import yaml

from runners.api import BadRequest, RunnerError
from tests.kit.inference_specs import change, mixed_prompts, outputs, spec_of
from tests.kit.paths import ROOT
from tests.kit.tiny_models import write_tiny_lora
from tests.kit.vllm_zygote import Zygote

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here"),
]


def on_vllm(model: Path | str, items: list[Any], **inference: Any) -> dict[str, Any]:
    spec = spec_of(model, items, "vllm", **inference)
    spec["model"]["vllm"] = {"dtype": "float32"}
    return spec


def both(
    forked: Zygote, make_context: Any, model: Path | str, items: list[Any], **inference: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same task on both engines."""
    spec = on_vllm(model, items, **inference)
    one = forked(make_context(spec))
    return one, forked(make_context({**spec, "engine": "transformers"}))


def without_time(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "usage": {**result["usage"], "latency_sec": 0}}


def test_greedy_answers_are_those_of_transformers(forked, tiny_llama, make_context) -> None:
    chat = [{"role": "user", "content": "what does a slot share?"}]
    vllm, transformers = both(forked, make_context, tiny_llama, [*mixed_prompts(63), chat], system_prompt="be brief")
    assert without_time(vllm) == without_time(transformers)
    assert vllm["usage"]["num_requests"] == 64


def test_the_first_task_with_a_class_of_models_asks_no_other_process(
    forked, tiny_llama, make_context, tmp_path
) -> None:
    """One that imports vLLM again, to find out about the class, and keeps what it found."""
    (cache := tmp_path / "cache").mkdir()
    context = make_context(on_vllm(tiny_llama, ["one"], max_tokens=1), cache_dir=str(cache))
    assert forked(context)["ok"]
    assert list(context.cache_dir.rglob("*")), "the caches are there"
    assert list(context.cache_dir.rglob("modelinfos")) == []


def test_images_are_those_of_transformers(forked, make_context) -> None:
    """In prompts with none, one and two images, which vLLM 0.32 takes where their marks are."""
    pytest.importorskip("PIL", reason="needs the extra 'inference'")
    from PIL import Image

    def image(color: str) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.new("RGB", (40, 24), color).save(buffer, "PNG")
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"},
        }

    red, blue, text = image("red"), image("blue"), {"type": "text", "text": "a task starts"}
    contents = [[red, text], [blue, text], [red, text, blue], [text], [blue, red, text]]
    chats = [[{"role": "user", "content": content}] for content in contents]
    vllm, transformers = both(forked, make_context, "builtin:tiny-vision", [*chats, "a task starts"])
    assert without_time(vllm) == without_time(transformers)
    assert len(set(outputs(vllm)[:5])) == 5, "the images make no difference"
    spec = change(on_vllm("builtin:tiny-vision", chats), "model.vllm.limit_mm_per_prompt", {"image": 1})
    with pytest.raises(BadRequest, match=r"limit_mm_per_prompt: a prompt has 2 images"):
        forked(make_context(spec))


def test_stops_penalties_and_logprobs_are_the_same(forked, tiny_llama, make_context) -> None:
    prompts = mixed_prompts(6, longest=10)
    text = outputs(forked(make_context({**spec_of(tiny_llama, prompts[:1])})))[0]
    options = {
        "stop": [text[6:9]],
        "presence_penalty": 0.4,
        "frequency_penalty": 0.6,
        "repetition_penalty": 1.2,
        "logprobs": 2,
    }
    vllm, transformers = both(forked, make_context, tiny_llama, prompts, **options)
    for one, other in zip(vllm["items"], transformers["items"], strict=True):
        assert {**one, "logprobs": 0} == {**other, "logprobs": 0}
        for mine, theirs in zip(one["logprobs"], other["logprobs"], strict=True):
            assert mine["token_id"] == theirs["token_id"]
            assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-3)
            assert [each["token_id"] for each in mine["top"]] == [each["token_id"] for each in theirs["top"]]


def test_seeds_and_several_answers(forked, tiny_llama, make_context) -> None:
    spec = on_vllm(tiny_llama, ["a task", "the node"], temperature=1.2, seed=2**40, n=3, max_tokens=8)
    one, again = forked(make_context(spec)), forked(make_context(spec))
    assert without_time(one) == without_time(again)
    assert len({each["output"] for each in one["items"][0]["outputs"]}) == 3
    other = forked(make_context(change(spec, "inference.seed", 6)))
    assert outputs(other) != outputs(one)


def test_unseeded_tasks_draw_for_themselves(forked, tiny_llama, make_context) -> None:
    spec = on_vllm(tiny_llama, ["a task"], temperature=1.5, max_tokens=12)
    assert len({tuple(outputs(forked(make_context(spec)))) for _ in range(3)}) > 1


def test_adapters_at_run_time_and_merged(forked, tiny_llama, make_context, tmp_path) -> None:
    for i in range(2):
        write_tiny_lora(tiny_llama, tmp_path / f"lora-{i}", seed=20 + i, rank=4 + 8 * i)
    spec = on_vllm(tiny_llama, mixed_prompts(6, longest=8))
    spec["model"]["adapters"] = [
        {"name": "one", "path": str(tmp_path / "lora-0"), "scale": 0.5},
        {"name": "two", "path": str(tmp_path / "lora-1")},
    ]
    spec["data"]["metadata"] = [{"adapter": name} for name in ("one", "two", "base", "two", "one", "base")]
    routed = outputs(forked(make_context(spec)))
    assert routed == outputs(forked(make_context({**spec, "engine": "transformers"})))
    merged = json_copy(spec)
    merged["model"]["adapters"] = [{**spec["model"]["adapters"][0], "apply": "merge"}]
    answers = outputs(forked(make_context(merged)))
    assert answers == outputs(forked(make_context({**merged, "engine": "transformers"})))
    assert (answers[0], answers[4]) == (routed[0], routed[4])
    assert answers[1] != routed[1]


def json_copy(spec: dict[str, Any]) -> dict[str, Any]:
    return msgspec.json.decode(msgspec.json.encode(spec))


def test_json_schema(forked, tiny_llama, make_context) -> None:
    schema = {"type": "object", "properties": {"ok": {"enum": ["yes", "no"]}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    result = forked(make_context(on_vllm(tiny_llama, ["a task", "the node"], json_schema=schema, max_tokens=40)))
    for item in result["items"]:
        assert msgspec.json.decode(item["output"])["ok"] in ("yes", "no")
        assert item["finish_reason"] == "stop"
    with pytest.raises(BadRequest, match=r"spec\.inference\.json_schema: vLLM refuses it"):
        forked(make_context(on_vllm(tiny_llama, ["a"], json_schema={"type": "colour"})))


def test_the_example(forked, make_context) -> None:
    document = yaml.safe_load((ROOT / "conf" / "tasks" / "inference-vllm.yaml").read_text())
    result = forked(make_context(document["spec"]))
    verdicts = {msgspec.json.decode(item["output"])["verdict"] for item in result["items"]}
    assert verdicts <= {"yes", "no", "unknown"}
    assert len(result["items"]) == 2


def test_merged_children_share_the_engine(forked, tiny_llama, make_context) -> None:
    parent = on_vllm(tiny_llama, ["a task"])
    children = [
        {"task_id": "good", "spec": on_vllm(tiny_llama, ["the node", "a slot"])},
        {"task_id": "bad", "spec": on_vllm(tiny_llama, ["the node"], max_tokens=3)},
    ]
    result = forked(make_context(parent, children=children))
    alone = forked(make_context({**children[0]["spec"], "engine": "transformers"}))
    assert outputs(result["children"]["good"]) == outputs(alone)
    assert "max_tokens: 3, but" in result["children"]["bad"]["error"]


def test_a_prompt_longer_than_max_model_len(forked, tiny_llama, make_context) -> None:
    spec = change(on_vllm(tiny_llama, ["a", "a task " * 50]), "model.vllm.max_model_len", 64)
    with pytest.raises(BadRequest, match=r"spec\.data\.items\[1\]: the prompt has \d+ tokens; the model takes 64"):
        forked(make_context(spec))
    result = forked(make_context(change(spec, "data.items", ["a", "a task"]), task_id="other"))
    assert [item["finish_reason"] for item in result["items"]] == ["length"] * 2


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.vllm.max_model_length", 64, r"spec\.model\.vllm\.max_model_length: unknown .*mean 'max_model_len'"),
        ("model.vllm.max_model_len", "long", r"spec\.model\.vllm\.max_model_len: "),
        ("model.vllm.max_model_len", 10**6, r"spec\.model\.vllm: vLLM cannot run|spec\.model\.vllm\.max_model_len"),
        ("model.vllm.model", "x", r"spec\.model\.vllm\.model: not for the task to set"),
        ("model.vllm.dtype", "int3", r"spec\.model\.vllm\.dtype: unknown dtype 'int3'"),
        ("model.vllm.tensor_parallel_size", 2, r"spec\.model\.vllm\.tensor_parallel_size: 2 .* has no GPU"),
        ("model.vllm.tensor_parallel_size", 0, r"spec\.model\.vllm\.tensor_parallel_size: expected"),
        ("model.vllm.max_num_seqs", -3, r"spec\.model\.vllm"),
        ("model.source.identifier", "no/such-model", r"spec\.model\.source\.identifier: 'no/such-model' is not in"),
        ("model.adapters", [{"path": "/no/such"}], r"spec\.model\.adapters\[0\]\.path: there is no"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(
    forked, tiny_llama, make_context, *, path: str, value: Any, message: str
) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        forked(make_context(change(on_vllm(tiny_llama, ["a task"]), path, value)))
    assert "\n" not in str(caught.value)


def test_an_adapter_that_does_not_fit(forked, tiny_llama, make_context, tmp_path) -> None:
    from runners.models.builtin import write_tiny_llama

    (tmp_path / "wide").mkdir()
    write_tiny_llama(tmp_path / "wide", hidden_size=64)
    write_tiny_lora(tmp_path / "wide", tmp_path / "lora")
    spec = on_vllm(tiny_llama, ["a task"])
    spec["model"]["adapters"] = [{"path": str(tmp_path / "lora")}]
    with pytest.raises(BadRequest, match=r"spec\.model\.adapters\[0\]: the adapter does not fit the model"):
        forked(make_context(spec))


@pytest.mark.slow
def test_an_engine_process_that_does_not_start_says_why(forked, tiny_llama, make_context) -> None:
    """vLLM itself says "see root cause above", and so would every task on several GPUs."""
    spec = on_vllm(tiny_llama, ["a task"])
    spec["model"]["vllm"] |= {
        "distributed_executor_backend": "mp",
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 9000,
    }
    with pytest.raises(RunnerError, match=r"tiny-llama' does not fit: No available memory for the cache blocks"):
        forked(make_context(spec))


@pytest.mark.slow
def test_a_dead_engine_process_ends_the_task(forked, tiny_llama, make_context) -> None:
    """With an engine in a process of its own, as several GPUs need: vLLM alone would wait for the dead forever."""

    family: list[psutil.Process] = []

    def kill_engine(pid: int) -> None:
        task = psutil.Process(pid)
        marker = context.tmp_dir / "phase-generate"
        while not marker.exists():
            if not task.is_running() or task.status() == psutil.STATUS_ZOMBIE:
                return
            os.sched_yield()
        family.extend(task.children(recursive=True))
        for child in family:
            if "EngineCore" in " ".join([child.name(), *child.cmdline()]):
                child.send_signal(signal.SIGKILL)

    spec = on_vllm(tiny_llama, ["a task"] * 64, max_tokens=2000)
    spec["model"]["vllm"]["distributed_executor_backend"] = "mp"
    context = make_context(spec)
    with pytest.raises(RunnerError, match=r"a process of vLLM's engine \(pid \d+\) died|EngineCore"):
        forked(context, kill_engine)
    assert family
    for child in family:  # vLLM's workers outlive their engine; on a node they are swept
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@pytest.mark.parametrize("json_schema", [None, {"type": "object"}])
def test_an_engine_that_is_dead_before_it_has_the_prompts_is_no_fault_of_the_task(json_schema: Any) -> None:
    """It was a bug of ours without a schema, and a fault of the schema with one."""
    from vllm.v1.engine.exceptions import EngineDeadError

    from runners.inference.engine import Request
    from runners.inference.options import InferenceOptions, sampling_of
    from runners.inference.vllm_engine import VllmEngine
    from runners.models.sources import Source

    def enqueue(*_: Any, **__: Any) -> None:
        raise EngineDeadError

    config = SimpleNamespace(device_config=SimpleNamespace(device_type="cuda"))
    llm: Any = SimpleNamespace(
        enqueue=enqueue,
        llm_engine=SimpleNamespace(vllm_config=config),
        model_config=SimpleNamespace(max_model_len=64, get_vocab_size=lambda: 8),
    )
    texts: Any = SimpleNamespace(resolved=lambda sampling: sampling, names_special=lambda _stop: False)
    processes: Any = SimpleNamespace(watched=contextlib.nullcontext)
    source = Source(path="m", revision=None, shown="m", where="spec.model")
    engine = VllmEngine(llm, texts, {}, processes, source)
    watch: Any = None
    with pytest.raises(RunnerError, match=r"vLLM's engine failed while generating: EngineDeadError") as caught:
        engine.generate(
            [Request((1, 2), sampling_of(InferenceOptions(json_schema=json_schema)))],
            watch,
            lambda _number, _answer: None,
        )
    assert type(caught.value) is RunnerError
