"""What the inference runner on Transformers refuses, each with one clear line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")
import torch

from runners.api import BadRequest, MissingDependency
from runners.inference import loader
from runners.inference import task as inference_task
from runners.inference.runner import InferenceRunner
from runners.models.sources import resolve_identifier
from tests.kit.inference_specs import change, spec_of


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("inference.top_pp", 0.5, r"spec\.inference\.top_pp: unknown field; did you mean 'top_p'\?"),
        ("inference.temperature", "warm", r"spec\.inference\.temperature: .*warm"),
        ("inference.temperature", -1, r"spec\.inference\.temperature: .*>= 0"),
        ("inference.top_p", 0, r"spec\.inference\.top_p: .*> 0"),
        ("inference.top_k", -2, r"spec\.inference\.top_k: .*>= -1"),
        ("inference.max_tokens", 0, r"spec\.inference\.max_tokens: .*>= 1"),
        ("inference.n", 2, r"spec\.inference\.n: 2 answers of a greedy request"),
        ("inference.stop", ["a", ""], r"spec\.inference\.stop: an empty string"),
        ("inference.stop", [3], r"spec\.inference\.stop"),
        ("inference.system_prompt", 3, r"spec\.inference\.system_prompt"),
        ("inference.json_schema", {"type": "object"}, r"spec\.inference\.json_schema: .*vLLM"),
        ("model.source.identifer", "x", r"spec\.model\.source\.identifer: unknown field; did you mean 'identifier'\?"),
        ("model.source.identifier", None, r"spec\.model\.source\.identifier: missing"),
        ("model.source.identifier", "/no/such/folder", r"spec\.model\.source\.identifier: there is no folder"),
        (
            "model.source.identifier",
            "no/such-model",
            r"spec\.model\.source\.identifier: 'no/such-model' is not in this",
        ),
        ("model.source.identifier", "a b", r"spec\.model\.source\.identifier: 'a b' is neither a folder"),
        ("model.source.identifier", "builtin:huge", r"spec\.model\.source\.identifier: no built-in 'builtin:huge'"),
        ("model.source.type", "ftp", r"spec\.model\.source\.type"),
        ("model.transformers.torch_dtyp", "auto", r"spec\.model\.transformers\.torch_dtyp: unknown field"),
        ("model.transformers.dtype", "int3", r"spec\.model\.transformers\.dtype: .*int3"),
        ("model.transformers.device_map", "cuda", r"device_map: 'cuda', but this task has no GPU"),
        ("model.transformers.use_flash_attention_2", True, r"use_flash_attention_2: flash attention needs a GPU"),
        ("model.transformers.low_cpu_mem_usage", False, r"low_cpu_mem_usage: false is not possible"),
        (
            "model.transformers.attn_implementation",
            "telepathy",
            r"spec\.model\.transformers\.attn_implementation: no attention",
        ),
        ("data.items", [], r"spec\.data\.items: empty"),
        ("data.items", None, r"spec\.data\.items: missing"),
        ("data.items", ["a", ""], r"spec\.data\.items\[1\]: is empty"),
        ("data.items", ["a", 3], r"spec\.data\.items\[1\]: expected a string or a list"),
        ("data.items", [[{"role": "user"}]], r"spec\.data\.items\[0\]\[0\]\.content: missing"),
        ("data.items", "a", r"spec\.data\.items: expected "),
        ("data.metadata", [{}, {}], r"spec\.data\.metadata: 2 mappings for 1 items"),
        ("data.metadata", [3], r"spec\.data\.metadata\[0\]"),
        ("data.itms", [], r"spec\.data\.itms: unknown field; did you mean 'items'\?"),
        ("data.type", "lists", r"spec\.data\.type: unknown source 'lists'; did you mean 'list'\?"),
        ("data.type", None, r"spec\.data\.type: missing"),
        ("data", None, r"spec\.data: missing"),
        ("shard", {"index": 2, "total": 2}, r"spec\.shard\.index: 2 of 2 shards"),
        ("shard", {"index": 0}, r"spec\.shard\.total: missing"),
        ("inferense", {}, r"spec\.inferense: unknown field; did you mean 'inference'\?"),
        ("engine", "vlm", r"spec\.engine: .*vlm"),
        ("inference.engine", "vllm", r"spec\.engine: 'transformers', but spec\.inference\.engine says 'vllm'"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(tiny_llama, make_context, path: str, value: Any, message: str) -> None:
    spec = change(spec_of(tiny_llama, ["a task"]), path, value)
    with pytest.raises(BadRequest, match=message) as caught:
        InferenceRunner().run(make_context(spec))
    assert "\n" not in str(caught.value)


def test_the_cpu_and_vllm_exclude_each_other(tiny_llama, make_context) -> None:
    spec = spec_of(tiny_llama, ["a"], "vllm") | {"enforce_cpu": True}
    with pytest.raises(BadRequest, match=r"spec\.engine: 'vllm' and enforce_cpu exclude each other"):
        InferenceRunner().run(make_context(spec))


def test_vllm_where_it_is_not_installed(tiny_llama, make_context) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed here")
    with pytest.raises(MissingDependency, match=r"vllm is not installed .*\[vllm\]"):
        InferenceRunner().run(make_context(spec_of(tiny_llama, ["a"], "vllm")))


def test_a_stranger_in_the_spec_is_told_to_the_log(tiny_llama, make_context, caplog) -> None:
    spec = spec_of(tiny_llama, ["a"], max_tokens=1) | {"priority_class": "high", "_private": 1}
    assert InferenceRunner().run(make_context(spec))["ok"] is True
    assert "fields not used: spec.priority_class\n" in caplog.text
    assert "_private" not in caplog.text


def test_both_names_of_the_metadata_are_too_many(tiny_llama, make_context) -> None:
    spec = spec_of(tiny_llama, ["a"])
    spec["data"] |= {"metadata": [{}], "items_metadata": [{}]}
    with pytest.raises(BadRequest, match=r"spec\.data\.items_metadata: means the same"):
        InferenceRunner().run(make_context(spec))


def test_a_folder_without_a_model(make_context, tmp_path) -> None:
    with pytest.raises(BadRequest, match=r"spec\.model\.source\.identifier: .* has no config\.json"):
        InferenceRunner().run(make_context(spec_of(tmp_path, ["a"])))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadRequest, match=r"spec\.model\.source\.identifier: .* cannot be loaded"):
        InferenceRunner().run(make_context(spec_of(tmp_path, ["a"])))


def test_damaged_weights(tiny_llama, make_context, tmp_path) -> None:
    for each in tiny_llama.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes()[:1000])
        if each.name != "model.safetensors":
            (tmp_path / each.name).write_bytes(each.read_bytes())
    with pytest.raises(BadRequest, match=r"spec\.model\.source\.identifier: .* cannot be loaded") as caught:
        InferenceRunner().run(make_context(spec_of(tmp_path, ["a"])))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["load_in_8bit", "load_in_4bit"])
def test_quantization_without_its_library(tiny_llama, make_context, field: str) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("bitsandbytes is installed here")
    spec = change(spec_of(tiny_llama, ["a"]), f"model.transformers.{field}", True)
    with pytest.raises(MissingDependency, match=f"bitsandbytes.*{field}.*is not installed"):
        InferenceRunner().run(make_context(spec))


def test_short_dtypes_and_attention(tiny_llama, make_context) -> None:
    spec = change(spec_of(tiny_llama, ["a"]), "model.transformers", {"dtype": "bf16", "attn_implementation": "eager"})
    context = make_context(spec)
    task = inference_task.read_task(context, spec)
    source = resolve_identifier(context, str(tiny_llama), None, "x")
    model, _ = loader.load_model(context, task, source)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert len(InferenceRunner().run(context)["items"]) == 1


def test_the_builtin_model_is_made_once_and_always_the_same(make_context, tmp_path) -> None:
    spec = spec_of(Path("x"), ["a task", "the node"])
    spec["model"]["source"]["identifier"] = "builtin:tiny-llama"
    one = InferenceRunner().run(make_context(spec, cache_dir=str(tmp_path / "one")))
    weights = tmp_path / "one" / "builtin" / "tiny-llama-v1" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    again = InferenceRunner().run(make_context(spec, cache_dir=str(tmp_path / "one")))
    other = InferenceRunner().run(make_context(spec, cache_dir=str(tmp_path / "two")))
    assert one["model"] == "builtin:tiny-llama"
    assert weights.stat().st_mtime_ns == made
    assert one["items"] == again["items"] == other["items"]
    assert [each.name for each in weights.parent.parent.iterdir()] == ["tiny-llama-v1"]


def test_options_of_the_other_engine_are_told_or_shared(tiny_llama, make_context, caplog) -> None:
    spec = spec_of(tiny_llama, ["a"], max_tokens=1)
    spec["model"] = {
        "source": spec["model"]["source"],
        "vllm": {"dtype": "half", "max_model_len": 9, "trust_remote_code": True},
    }
    context = make_context(spec)
    task = inference_task.read_task(context, spec)
    assert (task.transformers.dtype, task.transformers.trust_remote_code) == ("half", True)
    with caplog.at_level("INFO"):
        InferenceRunner().run(context)
    assert "fields not used: spec.model.vllm.max_model_len (engine transformers)" in caplog.text
    assert "dtype=float16" in caplog.text
