"""Checkpoints and adapters that lack weights are refused by training, too; only `reward` starts a fresh head."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.kit.odd_models import small_config, write
from tests.kit.tiny_models import write_tiny_lora
from tests.kit.training_tasks import PAIRS, SUMS, refused, train

TRAINING = {"max_steps": 1, "batch_size": 4, "max_seq_length": 64, "save_model": False, "save_strategy": "no"}
Names = Callable[[dict[str, Any]], dict[str, Any]]


def variant(source: Path, folder: Path, change: Names, file: str = "model.safetensors") -> Path:
    shutil.copytree(source, folder)
    weights = {name: weight.contiguous() for name, weight in change(load_file(source / file)).items()}
    save_file(weights, folder / file, metadata={"format": "pt"})
    return folder


def spec(folder: Path, task_type: str, **more: Any) -> dict[str, Any]:
    data = {"sft": {"prompts": SUMS[:4]}, "dpo": {"preferences": PAIRS[:4]}, "reward": {"preferences": PAIRS[:4]}}
    return {
        "model": {"source": {"identifier": str(folder)}},
        "data": data.get(task_type, {"prompts": SUMS[:4]}),
        "training": TRAINING,
        **more,
    }


@pytest.mark.parametrize("task_type", ["sft", "lora_sft", "dpo", "reward", "ppo"])
def test_names_of_a_compiled_model(tiny_llama: Path, tmp_path: Path, task_type: str) -> None:
    folder = variant(tiny_llama, tmp_path / "odd", lambda w: {f"_orig_mod.{name}": each for name, each in w.items()})
    more = {"reward": "length"} if task_type == "ppo" else {}
    message = refused(tmp_path, task_type, spec(folder, task_type, **more))
    assert "spec.model.source.identifier" in message
    assert "missing, first" in message
    assert "torch.compile" in message


def test_a_reward_model_without_its_head(tiny_llama: Path, tmp_path: Path) -> None:
    whole = tmp_path / "judge"
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).save_pretrained(whole)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(whole)
    folder = variant(whole, tmp_path / "odd", lambda w: {n: each for n, each in w.items() if "score" not in n})
    for task_type in ("grpo", "ppo"):
        found = spec(tiny_llama, task_type, reward_model={"identifier": str(folder)})
        found["training"] = {**TRAINING, "batch_size": 8}
        message = refused(tmp_path, task_type, found)
        assert "spec.reward_model.identifier" in message
        assert "'score.weight'" in message


def test_reward_starts_a_fresh_head_of_a_language_model(tiny_llama: Path, tmp_path: Path) -> None:
    assert train(tmp_path, "reward", spec(tiny_llama, "reward"))["dataset_size"] == 4


def other_names(weights: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("base_model.model.", "base_model.model._orig_mod."): each for name, each in weights.items()}


def half(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in weights.items() if "layers.0" in name}


@pytest.mark.parametrize("change", [other_names, half])
@pytest.mark.parametrize("task_type", ["sft", "lora_sft"])
def test_an_adapter_that_does_not_fit(tiny_llama: Path, tmp_path: Path, task_type: str, change: Names) -> None:
    write_tiny_lora(tiny_llama, tmp_path / "lora")
    folder = variant(tmp_path / "lora", tmp_path / "odd", change, "adapter_model.safetensors")
    load = {"checkpoint": {"load": {"type": "local", "path": str(folder)}}}
    message = refused(tmp_path, task_type, spec(tiny_llama, task_type, **load))
    assert "spec.checkpoint.load: the adapter does not fit the model: its file lacks 'base_model.model.model" in message


@pytest.mark.parametrize("task_type", ["sft", "lora_sft"])
def test_adapters_in_a_pickle_and_of_the_head(tiny_llama: Path, tmp_path: Path, task_type: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    write_tiny_lora(tiny_llama, tmp_path / "pickled")
    weights = half(load_file(tmp_path / "pickled" / "adapter_model.safetensors"))
    torch.save(weights, tmp_path / "pickled" / "adapter_model.bin")
    (tmp_path / "pickled" / "adapter_model.safetensors").unlink()
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    get_peft_model(base, LoraConfig(target_modules=["q_proj", "lm_head"])).save_pretrained(tmp_path / "head")
    no_head = variant(
        tmp_path / "head",
        tmp_path / "no-head",
        lambda w: {name: each for name, each in w.items() if "lm_head" not in name},
        "adapter_model.safetensors",
    )
    for folder, lacks in (
        (tmp_path / "pickled", "base_model.model.model.layers.1"),
        (no_head, "base_model.model.lm_head.lora_A"),
    ):
        load = {"checkpoint": {"load": {"type": "local", "path": str(folder)}}}
        message = refused(tmp_path, task_type, spec(tiny_llama, task_type, **load))
        assert f"the adapter does not fit the model: its file lacks '{lacks}" in message


def test_a_head_that_is_tied_is_merged_alone(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    def tied() -> Any:
        return AutoModelForCausalLM.from_pretrained(base)

    base = write(LlamaForCausalLM, tmp_path / "tied", small_config(512, tie_word_embeddings=True))
    adapted = get_peft_model(tied(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    load = {"checkpoint": {"load": {"type": "local", "path": str(tmp_path / "lora")}}}
    found = spec(base, "sft", **load)
    found["training"] = {**TRAINING, "save_model": True, "learning_rate": 1e-12}
    folder = train(tmp_path, "sft", found)["final_model_path"]
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(tied(), tmp_path / "lora")(ids).logits
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, wanted, atol=1e-4)
