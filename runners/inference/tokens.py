"""Text to token ids and back, for both engines: prompts, chat templates, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from runners.api import BadRequest
from runners.data.prompts import Message, Prompt
from runners.inference.engine import Pictures
from runners.inference.options import Sampling
from runners.models.sources import Source

NO_IMAGES = "holds an image, and the model takes none; leave it out, or name a model that takes images"
LEAD_TOKENS = 8
"""Tokens of the prompt that are decoded in front of an answer."""


class Texts:
    """A model's tokenizer, and the rules for encoding prompts and decoding answers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {token.content: token_id for token_id, token in added.items() if token.special}
        self._anchor: tuple[int, ...] | None = None

    def encode(self, prompts: Sequence[Prompt], wheres: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of each prompt, in order: plain text unchanged, messages through the model's chat template.

        A text that starts with the begin token gets no second one, and none gets the end token of a tokenizer that ends
        each text: the answer would begin a new one.

        Messages that end with an assistant's turn are left open at its end, so that the answer continues it.

        Args:
            wheres: the name of each prompt, for errors.

        Raises:
            BadRequest: the model has no chat template, or its template refuses a prompt.
        """
        encoded: dict[int, tuple[int, ...]] = {}
        texts = {i: prompt for i, prompt in enumerate(prompts) if isinstance(prompt, str)}
        if texts:
            batch = self.tokenizer(list(texts.values()), padding=False, truncation=False)["input_ids"]
            encoded = {i: self._open(text, ids) for (i, text), ids in zip(texts.items(), batch, strict=True)}
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                encoded[i] = self._apply_template(prompt, wheres[i])
        return [encoded[i] or (self._first_token(wheres[i]),) for i in range(len(prompts))]

    def resolved(self, sampling: Sampling) -> Sampling:
        """The same, with a stop string that is a special token as that token's id: no answer's text shows it."""
        ids = [self._special[each] for each in sampling.stop if each in self._special]
        strings = tuple(each for each in sampling.stop if each not in self._special)
        return msgspec.structs.replace(sampling, stop=strings, stop_token_ids=(*sampling.stop_token_ids, *ids))

    def reader(self, prompt_ids: Sequence[int], sampling: Sampling) -> Reader:
        """Reads the answers to one prompt; `sampling` as `resolved` gives it."""
        return Reader(self, prompt_ids, sampling)

    def token(self, token_id: int) -> str:
        """One token as text in the middle of a text; for logprobs."""
        if self._anchor is None:
            self._anchor = tuple(self.tokenizer("a", add_special_tokens=False)["input_ids"][-1:])
        return self.decode_after(self._anchor, (token_id,), special=True)

    def decode_after(self, lead: Sequence[int], token_ids: Sequence[int], *, special: bool = False) -> str:
        """The text that `token_ids` add behind `lead`. By themselves, some tokenizers drop their first space.

        Args:
            special: also write special tokens out.
        """
        head = self._decode(lead, special=special)
        text = self._decode([*lead, *token_ids], special=special)
        return text[len(head) :] if text.startswith(head) else self._decode(token_ids, special=special)

    def visible(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """The end of a prompt that its answer is decoded behind: enough tokens to hold a visible one, if there is."""
        end = tuple(prompt_ids[-LEAD_TOKENS:])
        return end if self._decode(end, special=False) else tuple(prompt_ids)

    @property
    def special(self) -> Sequence[str]:
        """The special tokens, as text."""
        return tuple(self._special)

    def names_special(self, stop: Sequence[str]) -> bool:
        """Whether a stop string has a special token in it, so that it is looked for in the text with these."""
        return any(token in each for each in stop for token in self._special)

    def bad_word_ids(self, words: Sequence[str], where: str = "spec.inference") -> list[list[int]]:
        """Token sequences of forbidden words, at the beginning of a text and within it, as vLLM takes them.

        Raises:
            BadRequest: the tokenizer makes no token of one of them.
        """
        found: list[list[int]] = []
        for word in words:
            plain, spaced = (
                self.tokenizer(prefix + word.lstrip(), add_special_tokens=False)["input_ids"] for prefix in ("", " ")
            )
            if not plain:
                raise BadRequest(f"{where}.bad_words: the tokenizer makes no token of {word!r}; leave it out")
            found.append(plain)
            if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
                found.append(spaced)
        return found

    def end_ids(self, generation_config: Any = None) -> frozenset[int]:
        """Ids of the tokens that end an answer, by the tokenizer and by the model's generation_config."""
        ids: set[int] = set()
        for source in (getattr(self.tokenizer, "eos_token_id", None), getattr(generation_config, "eos_token_id", None)):
            ids.update(source if isinstance(source, list | tuple) else [] if source is None else [source])
        return frozenset(ids)

    def _decode(self, token_ids: Sequence[int], *, special: bool) -> str:
        return str(
            self.tokenizer.decode(list(token_ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        )

    def render(self, messages: tuple[Message, ...], where: str) -> str:
        """Messages as the model's chat template writes them, with its special tokens.

        Raises:
            BadRequest: there is no template, or it refuses them.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise BadRequest(
                f"{where}: the model's tokenizer has no chat template; send plain prompts without spec.inference.chat"
            )
        import jinja2

        continued = messages[-1].role == "assistant"
        if continued and not messages[-1].has_content:
            raise BadRequest(f"{where}: ends with an empty assistant turn, which cannot be continued; leave it out")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    self._templated(messages),
                    tokenize=False,
                    add_generation_prompt=not continued,
                    continue_final_message=continued,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadRequest(f"{where}: the model's chat template does not take these messages: {error}") from error

    def _templated(self, messages: tuple[Message, ...]) -> list[dict[str, Any]]:
        return [message.templated() for message in messages]

    def encode_images(self, prompt: Prompt, where: str) -> Pictures:  # noqa: ARG002
        """A prompt that has images; see `Vision`.

        Raises:
            BadRequest: the model takes none.
        """
        raise BadRequest(f"{where}: {NO_IMAGES}")

    def _apply_template(self, messages: tuple[Message, ...], where: str) -> tuple[int, ...]:
        text = self.render(messages, where)
        return tuple(self.tokenizer(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"])

    def _open(self, text: str, token_ids: Sequence[int]) -> tuple[int, ...]:
        """A text's tokens without a second begin token, and without an end token that the text does not have."""
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        found = tuple(token_ids)
        if begin is not None and found[:2] == (begin, begin):
            found = found[1:]
        ended = end is not None and len(found) > 1 and found[-1] == end
        return found[:-1] if ended and not text.rstrip().endswith(self.tokenizer.eos_token) else found

    def _first_token(self, where: str) -> int:
        """The token for an empty prompt: the one that begins a text."""
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return token_id
        raise BadRequest(f"{where}: an empty prompt, and the model has no token that begins a text")


class Reader:
    """Reads the answers to one prompt: where a stop string ends one, and its text as it continues the prompt."""

    def __init__(self, texts: Texts, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        self._texts = texts
        self._lead = texts.visible(prompt_ids)
        self._sampling = sampling
        self._special = texts.names_special(sampling.stop)
        self._longest = max((len(each.encode()) for each in sampling.stop), default=0)

    def stops(self, token_ids: Sequence[int]) -> bool:
        """Whether the newest of `token_ids` completed a stop string.

        Looks only at the tail that can hold the longest one: a token that shows at all has at least one byte, and a
        few more make up for a character that starts before the tail, or for a space that a decoder drops there.
        """
        if not self._sampling.stop or len(token_ids) <= self._sampling.min_tokens:
            return False
        skipped = max(len(token_ids) - self._longest - LEAD_TOKENS, 0)
        lead = self._lead if skipped == 0 else ()
        return self._stop_at(lead, token_ids[skipped:], self._sampling.min_tokens - skipped)[1] is not None

    def text(self, token_ids: Sequence[int], finish_reason: str) -> str:
        """An answer's text, without the stop string or the task's stop token that ended it.

        Args:
            token_ids: everything that was generated.
        """
        if finish_reason == "stop" and token_ids and token_ids[-1] in self._sampling.stop_token_ids:
            token_ids = token_ids[:-1]
        elif finish_reason == "stop" and self._sampling.stop:
            text, at = self._stop_at(self._lead, token_ids, self._sampling.min_tokens)
            if at is not None:
                return self._before(token_ids, text, at)
        return self._texts.decode_after(self._lead, token_ids)

    def _stop_at(self, lead: Sequence[int], token_ids: Sequence[int], least: int) -> tuple[str, int | None]:
        """The text, and where in it the first stop string stands that ends behind the first `least` tokens."""
        text = self._texts.decode_after(lead, token_ids, special=self._special)
        start = len(self._texts.decode_after(lead, token_ids[:least], special=self._special)) if least > 0 else 0
        found = [text.find(each, max(start - len(each) + 1, 0)) for each in self._sampling.stop]
        return text, min((at for at in found if at >= 0), default=None)

    def _before(self, token_ids: Sequence[int], text: str, at: int) -> str:
        """The visible part of the text up to `at`."""
        if not self._special:
            return text[:at]
        for count in range(len(token_ids), -1, -1):  # where a special token begins, or a token that holds `at`
            whole = self._texts.decode_after(self._lead, token_ids[:count], special=True)
            if len(whole) <= at:
                break
        return self._texts.decode_after(self._lead, token_ids[:count]) + text[len(whole) : at]


def load_tokenizer(source: Source, trust_remote_code: bool, config: Any, cache_dir: str | None = None) -> Any:
    """The model's tokenizer. Raises what Transformers raises; see `sources.loading`.

    Args:
        config: the model's configuration, to read it only once.
    """
    from transformers import AutoTokenizer

    revision = source.revision if source.tokenizer is None else None
    path = source.tokenizer or source.path
    own = config if source.tokenizer is None else None
    return AutoTokenizer.from_pretrained(
        path, revision=revision, trust_remote_code=trust_remote_code, config=own, cache_dir=cache_dir
    )
