"""What would succeed with a wrong answer is refused: damaged or foreign weights, adapters and tokens; blank prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the extra 'inference'")
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from runners.api import BadRequest
from runners.inference.lora import check_fit
from runners.inference.runner import InferenceRunner
from runners.models.adapters import LocalAdapter, check_product
from runners.models.builtin import train_tokenizer
from tests.kit.inference_specs import change, outputs, spec_of
from tests.kit.odd_models import renamed, scaled, small_config, variant, write

PROMPTS = ["a task starts", "the queue waits for the next batch and then"]
WHERE = r"^spec\.model\.source\.identifier: "


def run(make_context: Any, spec: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return InferenceRunner().run(make_context(spec, **fields))


def test_weights_that_are_not_the_models(tiny_llama, make_context, tmp_path) -> None:
    rows = len(AutoTokenizer.from_pretrained(tiny_llama))
    variant(tiny_llama, tmp_path / "compiled", renamed("_orig_mod."))
    write(LlamaForSequenceClassification, tmp_path / "reward", small_config(rows, num_labels=1))
    for name, message in (
        ("compiled", "21 missing, first 'lm_head"),
        ("reward", "1 missing.*1 unexpected, first 'sco"),
    ):
        with pytest.raises(BadRequest, match=WHERE + f".*{message}"):
            run(make_context, spec_of(tmp_path / name, PROMPTS))
    spec = spec_of("x", PROMPTS)
    spec["model"]["source"] = {}
    with pytest.raises(BadRequest, match=r"^spec\.checkpoint\.load\.path: .*21 missing"):
        run(make_context, spec | {"checkpoint": {"load": {"path": str(tmp_path / "compiled")}}})


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"logprobs": 1}, {"frequency_penalty": 1.0}])
def test_nan_in_the_weights(tiny_llama, make_context, tmp_path, options: dict[str, Any]) -> None:
    variant(tiny_llama, tmp_path / "nan", scaled("layers.1.mlp.down", float("nan")))
    with pytest.raises(
        BadRequest, match=WHERE + r".*in float32: its weight 'model\.layers\.1\.mlp\.down_proj\.weight'"
    ):
        run(make_context, spec_of(tmp_path / "nan", PROMPTS, **options))


def test_an_overflow_of_the_dtype(tiny_llama, make_context, tmp_path) -> None:
    variant(tiny_llama, tmp_path / "large", lambda w: scaled("layers.0.mlp.down", 3e3)(scaled("0.mlp.up", 3e2)(w)))
    spec = spec_of(tmp_path / "large", PROMPTS)
    assert len(outputs(run(make_context, spec))) == 2
    with pytest.raises(BadRequest, match=WHERE + r".*overflow float16.*try dtype bfloat16 or float32"):
        run(make_context, change(spec, "model.transformers.dtype", "float16"))


def test_nan_in_an_adapter(tiny_llama, make_context, tmp_path) -> None:
    made = adapter(tiny_llama, tmp_path / "lora")
    rewrite(made, lambda w: {name: torch.full_like(each, float("nan")) for name, each in w.items()})
    with pytest.raises(BadRequest, match=WHERE + r".*its weight '.*lora_A"):
        run(make_context, with_adapter(tiny_llama, made))


def test_tokens_that_the_model_has_no_embeddings_for(tiny_llama, make_context, tmp_path, caplog) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"], "pad_token": "<|pad|>"})
    variant(tiny_llama, tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    answers = outputs(run(make_context, spec_of(tmp_path / "more", PROMPTS)))  # the pad token has no embedding, either
    assert answers == outputs(run(make_context, spec_of(tiny_llama, PROMPTS)))
    assert (
        f"tokenizer larger than the embeddings model={tmp_path / 'more'} tokens={rows + 2} rows={rows}" in caplog.text
    )
    ids = {tokenizer.convert_tokens_to_ids(each) for each in ("<|new|>", "<|pad|>")}
    assert ids == {rows, rows + 1}
    message = r"^spec\.data\.items\[1\]: token '<\|new\|>' has id \d+, and the model has embeddings for"
    with pytest.raises(BadRequest, match=message):
        run(make_context, spec_of(tmp_path / "more", ["a", "a <|new|>"]))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 8}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "head-lora": {"target_modules": ["lm_head"]},
    "embedding-lora": {"target_modules": ["embed_tokens", "q_proj"]},
    "bias": {"bias": "lora_only"},
    "all-biases": {"bias": "all"},
}
BEYOND = ("dora", "head", "embeddings", "bias", "all-biases")


def adapter(model: Path, folder: Path, **options: Any) -> Path:
    """A LoRA adapter with random weights in everything that it trains."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**config))
        for name, weight in peft.named_parameters():
            if "magnitude" in name:
                weight.mul_(1.5)
            elif weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.2)
    peft.save_pretrained(folder)
    return folder


def rewrite(folder: Path, change_weights: Any) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change_weights(load_file(file)).items()}, file, metadata={"format": "pt"})


def with_adapter(model: Path, folder: Path, **options: Any) -> dict[str, Any]:
    spec = spec_of(model, PROMPTS)
    spec["model"]["adapters"] = [{"path": str(folder), **options}]
    return spec


def by_peft(model: Path, folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder)
    answers = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = peft.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(ids, skip_special_tokens=True))
    return answers


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with biases, their head tied to their embeddings or not."""
    folder = tmp_path_factory.mktemp("bases")
    rows = len(train_tokenizer())
    for name, tied in (("loose", False), ("tied", True)):
        config = small_config(rows, tie_word_embeddings=tied, attention_bias=True)
        write(LlamaForCausalLM, folder / name, config)
    return {name: folder / name for name in ("loose", "tied")}


_alone: dict[Path, list[str]] = {}


def alone(model: Path, make_context: Any) -> list[str]:
    """What a model answers without an adapter; asked once."""
    if model not in _alone:
        _alone[model] = outputs(run(make_context, spec_of(model, PROMPTS)))
    return _alone[model]


@pytest.mark.parametrize(
    ("kind", "base"),
    [*((kind, "loose") for kind in KINDS), *((kind, "tied") for kind in KINDS if kind.startswith(("head", "embed")))],
)
def test_every_kind_of_lora_answers_as_by_peft(bases, make_context, tmp_path, kind: str, base: str) -> None:
    model = bases[base]
    made = adapter(model, tmp_path / "lora", **KINDS[kind])
    expected = by_peft(model, made)
    plain = alone(model, make_context)
    assert plain != expected
    for apply in ("runtime", "merge"):
        assert outputs(run(make_context, with_adapter(model, made, apply=apply))) == expected, apply
    for scale in (0, -1.0):
        if kind in BEYOND:
            with pytest.raises(
                BadRequest, match=r"^spec\.model\.adapters\[0\]\.scale: .* is more than a product A × B"
            ):
                run(make_context, with_adapter(model, made, scale=scale))
            continue
        scaled_answers = [
            outputs(run(make_context, with_adapter(model, made, scale=scale, apply=apply)))
            for apply in ("runtime", "merge")
        ]
        assert scaled_answers[0] == scaled_answers[1]
        assert (scaled_answers[0] == plain) == (scale == 0)


@pytest.mark.parametrize("name", ["pissa", "olora", "loftq"])
def test_a_scale_where_loading_changes_the_base(tiny_llama, make_context, tmp_path, name: str) -> None:
    made = adapter(tiny_llama, tmp_path / "lora")
    config = json.loads((made / "adapter_config.json").read_text()) | {"init_lora_weights": name}
    (made / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadRequest, match=rf"adapters\[0\]\.scale: 2, .*init_lora_weights='{name}'"):
        run(make_context, with_adapter(tiny_llama, made, scale=2))


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_vllm_can_apply_at_run_time(bases, tmp_path, kind: str) -> None:
    made = adapter(bases["loose"], tmp_path / "lora", **KINDS[kind])
    one = LocalAdapter(name="mine", folder=made, rank=4, apply="runtime", where="spec.model.adapters[0]")
    if kind not in BEYOND:
        check_product(one, "vLLM")
        return
    with pytest.raises(
        BadRequest, match=r"^spec\.model\.adapters\[0\]: vLLM cannot apply .*\(.*=.*\); set apply: merge"
    ):
        check_product(one, "vLLM")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda w: {k.replace("l.model.model.", "l.model._orig_mod.model."): v for k, v in w.items()},
            r"8 unknown weights, first 'base_model\.model\._orig_mod\..*; 8 missing weights, first 'base_model\.model",
        ),
        (lambda w: {k: v for k, v in w.items() if "layers.1" not in k}, r"4 missing weights, first '.*layers\.1\."),
        (lambda w: {k: v for k, v in w.items() if "lora_B" not in k}, r"4 missing weights, first '.*lora_B\.weight'"),
        (lambda w: {**w, FIRST.replace("q_proj", "x_proj"): w[FIRST].clone()}, r"1 unknown weights, first '.*x_proj"),
        (lambda w: {k: v[:, :-1] if k == FIRST else v for k, v in w.items()}, r"size mismatch"),
    ],
)
def test_adapters_that_fit_by_half(tiny_llama, make_context, tmp_path, changed: Any, message: str) -> None:
    made = adapter(tiny_llama, tmp_path / "lora")
    rewrite(made, changed)
    for apply in ("runtime", "merge"):
        with pytest.raises(BadRequest, match=rf"^spec\.model\.adapters\[0\]: the adapter does not fit .*{message}"):
            run(make_context, with_adapter(tiny_llama, made, apply=apply))
    config = AutoModelForCausalLM.from_pretrained(tiny_llama).config
    one = LocalAdapter(name="mine", folder=made, rank=4, apply="runtime", where="spec.model.adapters[0]")
    with pytest.raises(BadRequest, match=message):  # what vLLM is preceded by
        check_fit(make_context({}), one, config, trust_remote_code=False)


@pytest.mark.parametrize("kind", ["head", "bias"])
def test_adapters_without_the_weights_beside_their_matrices(bases, make_context, tmp_path, kind: str) -> None:
    made = adapter(bases["loose"], tmp_path / "lora", **KINDS[kind])
    rewrite(made, lambda w: {name: each for name, each in w.items() if "lora_" in name})
    named = {"head": r"lm_head\.weight", "bias": r"q_proj\.base_layer\.bias"}[kind]
    with pytest.raises(BadRequest, match=rf"adapters\[0\]: the adapter does not fit the model: .*{named}'"):
        run(make_context, with_adapter(bases["loose"], made))


@pytest.mark.parametrize(
    "cells", [["a task", "", "the node"], ["a task", "  ", "the node"], ["a task", None, "the node"]]
)
@pytest.mark.parametrize("options", [{}, {"n": 2, "temperature": 1.0, "seed": 1, "logprobs": 0}, {"chat": True}])
def test_a_blank_cell_gets_no_answer(tiny_llama, make_context, tmp_path, cells: list[Any], options: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": cell, "id": i}) + "\n" for i, cell in enumerate(cells)))
    spec = spec_of(tiny_llama, [], max_tokens=4, system_prompt="be brief", **options)
    spec["data"] = {"type": "jsonl", "path": str(file), "metadata_columns": ["id"]}
    spec["postprocess"] = {"jsonl_export": {"fields": {"id": "metadata.id", "output": "output"}}}
    result = run(make_context, spec)
    blank = result["items"][1]
    assert (blank["output"], blank["finish_reason"]) == ("", "blank")
    assert "blank" in blank["warning"]
    assert blank["metadata"]["id"] == 1
    assert result["blank_prompts"] == 1
    assert result["usage"]["num_requests"] == 2
    kept = {**spec, "data": {"type": "list", "items": [cells[0], cells[2]]}}
    del kept["postprocess"]
    alone = run(make_context, kept, task_id="alone")
    assert outputs(result)[::2] == outputs(alone)
    assert "blank_prompts" not in alone
    written = [json.loads(line) for line in Path(result["jsonl_export"]["path"]).read_text().splitlines()]
    assert [line["id"] for line in written] == [0, 1, 2]
    assert written[1]["output"] == ""


def test_nothing_but_blank_prompts(tiny_llama, make_context, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": ""}\n{"text": null}\n')
    spec = spec_of(tiny_llama, []) | {"data": {"type": "jsonl", "path": str(file)}}
    with pytest.raises(BadRequest, match=r"^spec\.data\.path line 1: blank, and so are all other prompts"):
        run(make_context, spec)
    with pytest.raises(BadRequest, match=r"^spec\.data\.items\[1\]: is empty"):
        run(make_context, spec_of(tiny_llama, ["a", " \n"]))
    blank_chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " "}]
    result = run(make_context, spec_of(tiny_llama, ["a", blank_chat], max_tokens=1))
    assert [item["finish_reason"] for item in result["items"]] == ["length", "blank"]
