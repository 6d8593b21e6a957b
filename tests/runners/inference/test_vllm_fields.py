"""vLLM refuses what Transformers refuses, and ends and reads answers as it does."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from runners.api import BadRequest
from tests.kit.inference_specs import outputs
from tests.kit.odd_models import INT8, packed, renamed, scaled, small_config, variant, without, write
from tests.runners.inference.test_vllm import both, on_vllm, without_time

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here"),
]
PROMPTS = ["a slot returns", "the node"]
SPECIAL_AT = 2


@pytest.fixture(scope="module")
def answers(forked, tiny_llama, tmp_path_factory) -> list[list[int]]:
    """Token ids of the greedy answers that nothing ends."""
    from transformers import AutoModelForCausalLM

    from runners.models.builtin import train_tokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), train_tokenizer()
    made = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
        made.append(ids.tolist())
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"stop_token_ids": "THIRD"},
        {"stop_token_ids": "THIRD", "min_tokens": 5},
        {"logit_bias": {"2": 100}, "ignore_eos": True, "min_tokens": 3},
        {"logit_bias": {"2": 100}, "min_tokens": 3, "stop": ["</s>"], "ignore_eos": True},
        {"logit_bias": "THIRD", "bad_words": ["returns", "a"]},
        {"stop": ["4"], "min_tokens": 5},
        {"stop": "SPECIAL"},
        {"stop": "AFTER-SPECIAL"},
    ],
)
def test_endings_are_those_of_transformers(
    forked,
    tiny_llama,
    answers,
    make_context,
    tmp_path,
    *,
    options: dict[str, Any],
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    third = answers[0][SPECIAL_AT]
    special = tokenizer.convert_ids_to_tokens(third)
    model = variant(tiny_llama, tmp_path / "model")
    if "SPECIAL" in str(options.get("stop")):
        tokenizer.add_special_tokens({"additional_special_tokens": [special]})
        tokenizer.save_pretrained(model)
    options = dict(options)
    for name, value in options.items():
        if value == "THIRD":
            options[name] = {"stop_token_ids": [third], "logit_bias": {str(third): -100}}[name]
    if options.get("stop") in ("SPECIAL", "AFTER-SPECIAL"):
        after = tokenizer.decode(answers[0][SPECIAL_AT + 1 : SPECIAL_AT + 2])
        options["stop"] = [special + (after if options["stop"] == "AFTER-SPECIAL" else "")]
    vllm, transformers = both(forked, make_context, model, PROMPTS, **options)
    assert without_time(vllm) == without_time(transformers)
    free = forked(make_context({**on_vllm(model, PROMPTS), "engine": "transformers"}))  # starts in a tenth of the time
    assert outputs(free) != outputs(vllm)


def test_chats_are_continued_and_blank_rows_skipped(forked, tiny_llama, make_context, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a slot"}]
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in (chat, None, "a task")))
    spec = on_vllm(tiny_llama, [], max_tokens=6, logprobs=0) | {"data": {"type": "jsonl", "path": str(file)}}
    vllm = forked(make_context(spec))
    late = {name for name in forked.imported if name.startswith(("vllm.", "compressed_tensors"))}
    assert late == set(), "the fork server imports what each engine needs"
    transformers = forked(make_context({**spec, "engine": "transformers"}))
    assert [item["finish_reason"] for item in vllm["items"]] == ["length", "blank", "length"]
    assert outputs(vllm) == outputs(transformers)
    assert vllm["blank_prompts"] == transformers["blank_prompts"] == 1


def test_weights_and_numbers_are_refused(forked, tiny_llama, make_context, tmp_path) -> None:
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    rows = len(AutoTokenizer.from_pretrained(tiny_llama))
    variant(tiny_llama, tmp_path / "compiled", renamed("_orig_mod."))
    variant(tiny_llama, tmp_path / "nan", scaled("layers.1.mlp.down", float("nan")))
    variant(tiny_llama, tmp_path / "large", lambda w: scaled("layers.0.mlp.down", 3e3)(scaled("0.mlp.up", 3e2)(w)))
    variant(tiny_llama, tmp_path / "tied", tie_word_embeddings=True)
    variant(tiny_llama, tmp_path / "infinite", scaled("lm_head", 2e38))  # infinity in the logits, and no NaN
    write(LlamaForSequenceClassification, tmp_path / "reward", small_config(rows, num_labels=1))
    variant(
        tiny_llama,
        tmp_path / "int8",
        lambda w: without("layers.1.self_attn.q_proj")(packed("compressed-tensors")(w)),
        quantization_config=INT8,
    )
    for name, dtype, message in (
        ("int8", "float32", r"1 missing, first 'model\.layers\.1\.self_attn\.q_proj\.weight'"),
        ("tied", "float32", r"an output layer 'lm_head\.weight' that differs from the embeddings"),
        ("compiled", "float32", r"21 missing, first 'lm_head\.weight'.*torch\.compile"),
        ("reward", "float32", r"1 unexpected, first 'score\.weight'"),
        ("nan", "float32", r"no finite numbers in float32"),
        ("large", "float16", r"overflow float16.*try dtype bfloat16 or float32"),
        ("infinite", "float32", r"no finite numbers in float32: its numbers overflow"),
    ):
        spec = on_vllm(tmp_path / name, PROMPTS)
        spec["model"]["vllm"]["dtype"] = dtype
        with pytest.raises(BadRequest, match=rf"^spec\.model\.source\.identifier: .*{message}"):
            forked(make_context(spec))


def test_options_that_change_which_weights_are_loaded(forked, tiny_llama, make_context) -> None:
    for option, message in (
        ({"load_format": "dummy"}, r"^spec\.model\.vllm\.load_format: 'dummy' fills the model with random weights"),
        ({"hf_overrides": {"num_hidden_layers": 3}}, r"9 missing, first 'model\.layers\.2"),
        ({"hf_overrides": {"num_hidden_layers": 1}, "load_format": "safetensors"}, r"9 unexpected"),
        ({"quantization": "fp8", "hf_overrides": {"num_hidden_layers": 3}}, r"9 missing"),
        ({"model_impl": "vllm", "hf_overrides": {"num_hidden_layers": 3}}, r"9 missing"),
        ({"load_format": "pt"}, r"cannot be loaded: .*pytorch_model"),
    ):
        spec = on_vllm(tiny_llama, PROMPTS)
        spec["model"]["vllm"] |= option
        with pytest.raises(BadRequest, match=message):
            forked(make_context(spec))


def test_adapters_that_are_more_than_vllm_applies(forked, tiny_llama, make_context, tmp_path) -> None:
    from tests.runners.inference.test_refusals import KINDS, adapter, rewrite

    for kind in ("dora", "head", "head-lora"):
        made = adapter(tiny_llama, tmp_path / kind, **KINDS[kind])
        spec = on_vllm(tiny_llama, PROMPTS)
        spec["model"]["adapters"] = [{"path": str(made), "apply": "merge"}]
        merged = outputs(forked(make_context(spec)))
        assert merged == outputs(forked(make_context({**spec, "engine": "transformers"})))
        spec["model"]["adapters"] = [{"path": str(made)}]
        if kind == "head-lora":
            assert outputs(forked(make_context(spec))) == merged
            continue
        with pytest.raises(
            BadRequest, match=r"adapters\[0\]: vLLM cannot apply the adapter at run time: .*apply: merge"
        ):
            forked(make_context(spec))
    made = adapter(tiny_llama, tmp_path / "half")
    rewrite(made, lambda w: {name: each for name, each in w.items() if "layers.1" not in name})
    spec["model"]["adapters"] = [{"path": str(made)}]
    with pytest.raises(BadRequest, match=r"adapters\[0\]: the adapter does not fit the model: 4 missing weights"):
        forked(make_context(spec))
