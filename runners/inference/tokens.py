"""Text to token ids and back, for every engine: prompts, chat templates, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runners.api import BadRequest
from runners.data.prompts import Message, Prompt
from runners.models.sources import Source


class Texts:
    """A model's tokenizer, and the rules by which a task's items become prompts."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, prompts: Sequence[Prompt], wheres: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of each prompt, in order: plain text as it is, messages through the model's chat template.

        Args:
            wheres: what each prompt is called in an error.

        Raises:
            BadRequest: the model has no chat template, or its template refuses a prompt.
        """
        encoded: dict[int, tuple[int, ...]] = {}
        texts = {i: prompt for i, prompt in enumerate(prompts) if isinstance(prompt, str)}
        if texts:
            batch = self.tokenizer(list(texts.values()), padding=False, truncation=False)["input_ids"]
            encoded = {i: tuple(ids) for i, ids in zip(texts, batch, strict=True)}
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                encoded[i] = self._apply_template(prompt, wheres[i])
        return [encoded[i] or (self._first_token(wheres[i]),) for i in range(len(prompts))]

    def decode(self, token_ids: Sequence[int], stop: Sequence[str] = ()) -> str:
        """The text of an answer, cut before the first of its stop strings."""
        text = self._decode(token_ids)
        ends = [at for at in (text.find(each) for each in stop) if at >= 0]
        return text[: min(ends)] if ends else text

    def token(self, token_id: int) -> str:
        """One token as text; for logprobs."""
        return self.tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def stops_at(self, token_ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the newest of `token_ids` completed a stop string.

        Looks only at the tail that can hold the longest one: a token that shows at all has at least one byte,
        and a few more make up for a character that starts before the tail.
        """
        if not stop:
            return False
        tail = self._decode(token_ids[-(max(len(each.encode()) for each in stop) + 8) :])
        return any(each in tail for each in stop)

    def end_ids(self, generation_config: Any = None) -> frozenset[int]:
        """Ids of the tokens that end an answer, by the tokenizer and by the model's generation_config."""
        ids: set[int] = set()
        for source in (getattr(self.tokenizer, "eos_token_id", None), getattr(generation_config, "eos_token_id", None)):
            ids.update(source if isinstance(source, list | tuple) else [] if source is None else [source])
        return frozenset(ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _apply_template(self, messages: tuple[Message, ...], where: str) -> tuple[int, ...]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise BadRequest(
                f"{where}: the model's tokenizer has no chat template; send plain prompts without spec.inference.chat"
            )
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages], tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadRequest(f"{where}: the model's chat template does not take these messages: {error}") from error
        return tuple(self.tokenizer(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"])

    def _first_token(self, where: str) -> int:
        """What stands for an empty prompt: the token that begins a text."""
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return token_id
        raise BadRequest(f"{where}: an empty prompt, and the model has no token that begins a text")


def load_tokenizer(source: Source, trust_remote_code: bool, config: Any, cache_dir: str | None = None) -> Any:
    """The model's tokenizer. Raises what `transformers` raises; see `sources.loading`.

    Args:
        config: the model's, which need not be read and checked twice.
    """
    from transformers import AutoTokenizer

    revision = source.revision if source.tokenizer is None else None
    path = source.tokenizer or source.path
    own = config if source.tokenizer is None else None
    return AutoTokenizer.from_pretrained(
        path, revision=revision, trust_remote_code=trust_remote_code, config=own, cache_dir=cache_dir
    )
