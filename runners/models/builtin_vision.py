"""`builtin:tiny-vision`: a random Idefics3, a Llama that also takes images, for examples and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

IMAGE_PIXELS, PATCH_PIXELS, MERGED = 32, 8, 2
IMAGE_TOKENS = (IMAGE_PIXELS // PATCH_PIXELS // MERGED) ** 2
"""Of one image, whatever its size."""
IMAGE = "<image>"
_MARKS = (IMAGE, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}{% endfor %}{% endif %}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def write_tiny_vision(folder: Path, tokenizer: Any, *, seed: int = 0) -> None:
    """Write a model of random float32 weights and its processor into `folder`.

    Args:
        tokenizer: gets the marks of images and a chat template.
    """
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.utils import logging

    readable = _readable(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_MARKS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Idefics3Config(
        vision_config={**vision, "image_size": IMAGE_PIXELS, "patch_size": PATCH_PIXELS},
        text_config={
            **text, **ends, "model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2,
            "max_position_embeddings": 2048, "initializer_range": 0.2, "tie_word_embeddings": False,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=MERGED,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(config).to(torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ("connector" in name or "vision_model" in name) and weight.ndim > 1:
                    weight.normal_(0.0, 0.2)  # so that another image is another answer
            for token_id in range(len(tokenizer)):
                if token_id not in readable:
                    model.lm_head.weight[token_id] = 0.0
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": IMAGE_PIXELS}, max_image_size={"longest_edge": IMAGE_PIXELS}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=IMAGE_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _readable(tokenizer: Any) -> set[int]:
    """The tokens that an answer may have."""
    found = set()
    for token, token_id in tokenizer.get_vocab().items():
        text = tokenizer.convert_tokens_to_string([token])
        if text.isascii() and text.isprintable() and token not in (tokenizer.bos_token, tokenizer.pad_token):
            found.add(token_id)
    return found
