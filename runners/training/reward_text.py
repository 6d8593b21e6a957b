"""Input of a reward model, the same in its training and in its use by ppo, grpo and rloo."""

from __future__ import annotations

from typing import Any

from runners.training import templates
from runners.training.templates import Where


def answer_ids(tokenizer: Any, prompt: Any, answer: Any, where: Where, **more: Any) -> list[int]:
    """Tokens of a prompt with its answer: a chat by the chat template, a text with an end token.

    Args:
        prompt: a text, a chat, or None where `answer` holds it.
        answer: a text, or a chat's turns.
        where: the row's place, for errors.
        more: for the chat template.
    """
    if isinstance(prompt, list) or isinstance(answer, list):
        if tokenizer.chat_template:
            return templates.ids(tokenizer, _chat(prompt, answer), where, **more)
        prompt, answer = f"{text_of(prompt or '')}\n", text_of(answer)
    return ended(tokenizer, templates.text_ids(tokenizer, f"{prompt or ''}{answer}"))


def ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """`ids` with one end token at the end."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _chat(prompt: Any, answer: Any) -> list[dict[str, Any]]:
    """The whole chat. A text answer continues a last turn of the assistant."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
    if not isinstance(answer, str):
        return [*before, *answer]
    if before and before[-1]["role"] == "assistant":
        return [*before[:-1], {**before[-1], "content": f"{before[-1]['content']}{answer}"}]
    return [*before, {"role": "assistant", "content": answer}]


def text_of(prompt: Any) -> str:
    """A prompt or completion as one text: for a chat, the contents of its messages."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message["content"]) for message in prompt)
