"""Random models and an adapter that the node builds itself (`builtin:tiny-llama` …), for examples and tests.

Generated on first use, always with the same weights. The answers are meaningless text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmesh.files.removal import remove_path
from runners.api import BadRequest

PREFIX = "builtin:"
TINY_LLAMA = "builtin:tiny-llama"
TINY_VISION = "builtin:tiny-vision"
TINY_LORA = "builtin:tiny-lora"
"""A random LoRA adapter for it."""
TINY_SCORER = "builtin:tiny-scorer"
"""A random cross-encoder of one label."""
LAYERS, HIDDEN_SIZE, LORA_RANK = 2, 128, 4

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_SUBJECTS = ("a task", "the node", "a slot", "the model", "an engine", "the queue", "a result", "the network", "a user")
_VERBS = ("starts", "ends", "returns", "waits for", "shares", "reports", "measures", "keeps", "sends", "reads")
_OBJECTS = ("its memory", "every token", "the prompt", "an answer", "the next batch", "one GPU", "the log", "a folder")


def corpus() -> list[str]:
    """Training text of the built-in tokenizer: a few hundred sentences."""
    return [
        f"{subject} {verb} {thing}, and then {_SUBJECTS[(i + j + k) % len(_SUBJECTS)]} {verb} {thing} again."
        for i, subject in enumerate(_SUBJECTS)
        for j, verb in enumerate(_VERBS)
        for k, thing in enumerate(_OBJECTS)
    ]


def resolve(identifier: str, cache_dir: Path, where: str = "spec.model.source.identifier") -> Path:
    """Folder of a `builtin:` model or adapter under `cache_dir`. Created on first use; safe under concurrency.

    Raises:
        BadRequest: unknown identifier.
    """
    if identifier not in _RECIPES:
        raise BadRequest(f"{where}: no built-in {identifier!r}; there are: {', '.join(_RECIPES)}")
    name, write = _RECIPES[identifier]
    target = cache_dir / "builtin" / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
    try:
        write(scratch)
        scratch.chmod(0o755)
        scratch.rename(target)  # atomic: no reader sees a partial folder
    except OSError:
        if not target.is_dir():  # another task was faster, with identical content
            raise
    finally:
        remove_path(scratch)
    return target


def write_tiny_llama(
    folder: Path, *, seed: int = 0, layers: int = LAYERS, hidden_size: int = HIDDEN_SIZE, max_positions: int = 2048
) -> None:
    """Write a Llama of random float32 weights and a tokenizer with chat template, bos, eos and pad into `folder`.

    Args:
        hidden_size: a multiple of 32; each head has 32 dimensions, two heads share a key-value head.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    tokenizer = train_tokenizer()
    heads = hidden_size // 32
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 2, 1),
        max_position_embeddings=max_positions,
        # Wide enough to separate the best token from the second, so that rounding does not change greedy text.
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():  # unreadable tokens score 0, far below the best
        for token, token_id in tokenizer.get_vocab().items():
            text = tokenizer.convert_tokens_to_string([token])
            readable = text.isascii() and text.isprintable() and token not in (tokenizer.bos_token, tokenizer.pad_token)
            if not readable:
                model.lm_head.weight[token_id] = 0.0
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_tiny_lora(folder: Path, *, seed: int = 1) -> None:
    """Write a LoRA adapter of random weights, large enough to change every answer, into `folder`."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for module, size in (("q_proj", HIDDEN_SIZE), ("v_proj", HIDDEN_SIZE // 2)):
            path = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{path}.lora_A.weight"] = torch.randn(LORA_RANK, HIDDEN_SIZE, generator=draw) * 0.2
            weights[f"{path}.lora_B.weight"] = torch.randn(size, LORA_RANK, generator=draw) * 0.2
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": TINY_LLAMA,
        "r": LORA_RANK,
        "lora_alpha": 4 * LORA_RANK,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _write_tiny_vision(folder: Path) -> None:
    from runners.models.builtin_vision import write_tiny_vision

    write_tiny_vision(folder, train_tokenizer())


def write_tiny_scorer(folder: Path, *, seed: int = 2) -> None:
    """Write a cross-encoder of random float32 weights, a BERT with one label, and its tokenizer into `folder`."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification
    from transformers.utils import logging

    tokenizer = train_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512, num_labels=1, initializer_range=0.5, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config).to(torch.float32)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)


def train_tokenizer(vocab_size: int = 512) -> Any:
    """A byte-level BPE tokenizer trained on `corpus()`; any text round-trips through it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


# A changed recipe needs a new name: nodes cache what they have built.
_RECIPES: dict[str, tuple[str, Callable[[Path], None]]] = {
    TINY_LLAMA: ("tiny-llama-v1", write_tiny_llama),
    TINY_VISION: ("tiny-vision-v1", _write_tiny_vision),
    TINY_LORA: ("tiny-lora-v1", write_tiny_lora),
    TINY_SCORER: ("tiny-scorer-v1", write_tiny_scorer),
}
