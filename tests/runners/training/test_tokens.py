"""Special tokens: one begin token before a text that has its own, and a saved model that stops where a turn ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runners.api import Context

pytest.importorskip("trl", reason="needs the extra 'training'")
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from runners.training import prompts, templates
from tests.kit.training_tasks import refused, train
from tests.runners.training.test_chats import ours

Make = Callable[..., Context]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a slot"}]


@pytest.fixture(scope="module")
def beginning(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts the begin token before each text, as Llama's do."""
    folder = tmp_path_factory.mktemp("models") / "beginning"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chatml(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose template ends turns with a token that is not its end token."""
    folder = tmp_path_factory.mktemp("models") / "chatml"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **size, **ids)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_sft_trains_on_one_begin_token(beginning: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(beginning)
    written = tokenizer.apply_chat_template(CHAT, tokenize=False)
    begin = tokenizer.bos_token_id
    assert tokenizer(written)["input_ids"][:2] == [begin, begin]
    wanted = tokenizer(written + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    assert ours(beginning, {"text": written})["input_ids"] == wanted
    assert ours(beginning, {"text": "the node"})["input_ids"] == tokenizer("the node</s>")["input_ids"]


def test_prompts_have_one_begin_token(beginning: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(beginning)
    for text in ("<s>the node", "the node"):
        bare = templates.without_begin(tokenizer, text)
        assert tokenizer(bare)["input_ids"] == tokenizer("the node")["input_ids"] == prompts.encode(text, tokenizer)


@pytest.mark.parametrize("task_type", ["sft", "dpo", "reward", "grpo", "ppo"])
def test_every_trainer_counts_one_begin_token(beginning: Path, tmp_path: Path, task_type: str) -> None:
    """A begin token in the text makes no difference."""
    rewarded = {"reward": "length", "generation": {"max_new_tokens": 1}} if task_type in ("grpo", "ppo") else {}
    training = {"max_steps": 1, "batch_size": 2, "logging_steps": 1, "save_model": False, "max_seq_length": 64}
    training |= {"num_generations": 2} if task_type == "grpo" else {}
    counts = []
    for i, begin in enumerate(("", "<s>")):
        text = f"{begin}the node"
        data: dict[str, Any] = {
            "sft": {"prompts": [text] * 2},
            "dpo": {"preferences": [{"prompt": text, "chosen": " a", "rejected": " b"}] * 2},
            "reward": {"preferences": [{"prompt": text, "chosen": " a", "rejected": " b"}] * 2},
        }.get(task_type, {"prompts": [text] * 2})
        spec = {"model": {"source": {"identifier": str(beginning)}}, "data": data, "training": training, **rewarded}
        counts.append(train(tmp_path, task_type, spec, task_id=f"task-{i}")["metrics"]["tokens"])
    assert counts[0] == counts[1] > 0


def test_the_saved_model_stops_where_a_turn_ends(chatml: Path, tmp_path: Path) -> None:
    training = {"max_steps": 60, "batch_size": 4, "learning_rate": 5e-3, "max_seq_length": 64}
    spec = {
        "model": {"source": {"identifier": str(chatml)}},
        "data": {"messages": [CHAT] * 4},
        "training": {**training, "logging_steps": 60, "save_strategy": "no"},
    }
    folder = train(tmp_path, "sft", spec)["final_model_path"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in GenerationConfig.from_pretrained(folder).eos_token_id
    inputs = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    assert found[inputs["input_ids"].shape[1] :].tolist() == [
        *tokenizer("a slot", add_special_tokens=False)["input_ids"],
        end,
    ]


@pytest.mark.parametrize("task_type", ["lora_sft", "ppo"])
def test_a_saved_adapter_says_where_a_turn_ends(chatml: Path, tmp_path: Path, task_type: str) -> None:
    spec: dict[str, Any] = {
        "model": {"source": {"identifier": str(chatml)}},
        "data": {"messages": [CHAT] * 2} if task_type == "lora_sft" else {"prompts": ["a", "b"]},
        "training": {"max_steps": 1, "batch_size": 2, "max_seq_length": 64, "save_strategy": "no"},
        "lora": {"r": 4},
        **({} if task_type == "lora_sft" else {"reward": "length", "generation": {"max_new_tokens": 2}}),
    }
    folder = train(tmp_path, task_type, spec)["final_lora_path"]
    end = AutoTokenizer.from_pretrained(chatml).convert_tokens_to_ids("<|im_end|>")
    assert end in GenerationConfig.from_pretrained(folder).eos_token_id


def test_where_a_turn_ends_with_the_end_token_nothing_is_added(tiny_llama: Path, chatml: Path) -> None:
    plain, other = AutoTokenizer.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(chatml)
    assert templates.end_tokens(plain) == [plain.eos_token_id]
    assert templates.end_tokens(other) == [other.eos_token_id, other.convert_tokens_to_ids("<|im_end|>")]
    plain.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert templates.end_tokens(plain) == [plain.eos_token_id]


def test_assistant_only_loss_is_trls(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    )
    from trl import SFTConfig

    from runners.training.sft_rows import MASKED, SftRows

    config = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, assistant_only_loss=True)
    found = SftRows(tokenizer, config).tokens({"messages": CHAT}, lambda: "row")
    mask = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    kept = [i if bit else MASKED for i, bit in zip(mask["input_ids"], mask["assistant_masks"], strict=True)]
    assert found["labels"] == kept
    assert tokenizer.decode([i for i in kept if i != MASKED]).strip() == "a slot</s>"


def test_an_argument_without_effect_is_refused(tmp_path: Path) -> None:
    training = {"max_steps": 1, "trainer_args": {"completion_only_loss": True}}
    message = refused(tmp_path, "sft", {"data": {"prompts": ["a"]}, "training": training})
    assert "spec.training.trainer_args.completion_only_loss: would have no effect" in message
