"""Takes the reasoning of a model that thinks out of its answers.

`think` is built in, for both engines: what stands in `<think>…</think>`. The other names are vLLM's reasoning parsers.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from runners.api import BadRequest, Context
from runners.inference.engine import Output
from runners.inference.tokens import Texts

BUILT_IN = "think"
SETTING = "tasks.reasoning_parsers"
OPENING, CLOSING = "<think>", "</think>"


class Split(msgspec.Struct, frozen=True):
    """An answer in two."""

    reasoning: str | None
    """None: the model did not think."""
    text: str
    """The rest; empty where the answer ended before the reasoning did."""
    tokens: int = 0
    """Of the reasoning, where the parser can count them."""


class Splitter(Protocol):
    """Takes the reasoning out of answers."""

    def __call__(
        self, prompt: Sequence[int], output: Output, template_arguments: Mapping[str, Any] | None = None
    ) -> Split:
        """
        Args:
            prompt: its tokens.
            template_arguments: what the request gave to the chat template: some of vLLM's parsers depend on it.
        """
        ...


def check_parser(name: str | None, engine: str, where: str) -> None:
    """Raises BadRequest for a parser that the engine does not have."""
    if engine == "transformers" and name not in (None, BUILT_IN):
        raise BadRequest(
            f"{where}: {name!r} is a parser of vLLM; with Transformers there is {BUILT_IN!r}, for <think>…</think>"
        )


def check_allowed(ctx: Context, name: str | None, where: str) -> None:
    """Raises BadRequest for a parser that the operator does not allow."""
    if name not in (None, BUILT_IN) and not any(
        fnmatch.fnmatchcase(str(name), each) for each in ctx.job.permits.reasoning_parsers
    ):
        raise BadRequest(f"{where}: the node's setting {SETTING} does not list {name!r}; {BUILT_IN!r} needs no setting")


def splitter_of(ctx: Context, name: str | None, engine: str, texts: Texts, where: str) -> Splitter | None:
    """The named parser; None where the task names none.

    Args:
        engine: the one that the task runs on.

    Raises:
        BadRequest: the engine or the operator does not have it, or it does not fit the model's tokenizer.
    """
    if name is None:
        return None
    check_parser(name, engine, where)
    check_allowed(ctx, name, where)
    return Think(texts) if name == BUILT_IN else VllmParser(name, texts, where)


class Think:
    """The built-in parser. White space around reasoning and answer is left out.

    A template that ends the prompt with `<think>` has begun the reasoning: all is reasoning until it ends. In an answer
    that has no tag there is none.
    """

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._special = texts.names_special((OPENING, CLOSING))

    def __call__(
        self,
        prompt: Sequence[int],
        output: Output,
        template_arguments: Mapping[str, Any] | None = None,  # noqa: ARG002 - for vLLM's
    ) -> Split:
        opened = self._texts.decode_after((), prompt[-16:], special=True).rstrip().endswith(OPENING)
        whole = self._whole(prompt, output)
        before, closing, after = whole.partition(CLOSING)
        begins = before.lstrip().startswith(OPENING)
        if not (opened or closing or begins):
            return Split(None, output.text)
        reasoning = before.lstrip().removeprefix(OPENING).strip()
        if not self._special:
            return Split(reasoning, after.strip() if closing else "", self._count(output, reasoning))
        return Split(reasoning, self._visible(after).strip(), self._count(output, reasoning))

    def _whole(self, prompt: Sequence[int], output: Output) -> str:
        """The answer with its tags, up to a stop string."""
        if not self._special:
            return output.text
        lead = self._texts.visible(prompt)
        whole = self._texts.decode_after(lead, output.token_ids, special=True)
        hidden = self._texts.decode_after(lead, output.token_ids)
        if len(output.text) < len(hidden) and hidden.startswith(output.text):  # a stop string ended it
            cut = hidden[len(output.text) :]
            at = whole.rfind(cut)
            return whole[:at] if at >= 0 else whole
        return whole

    def _visible(self, text: str) -> str:
        for token in self._texts.special:
            text = text.replace(token, "")
        return text

    def _count(self, output: Output, reasoning: str) -> int:
        """Tokens up to the closing tag, as far as the tokenizer finds them again."""
        ids = self._texts.tokenizer(reasoning, add_special_tokens=False)["input_ids"] if reasoning else []
        return min(len(ids), len(output.token_ids))


class VllmParser:
    """One of vLLM's reasoning parsers, used as its server uses it."""

    def __init__(self, name: str, texts: Texts, where: str) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.reasoning import ReasoningParserManager

        self._texts = texts
        try:
            self._class: Any = ReasoningParserManager.get_reasoning_parser(name)
            self._parser = self._class(texts.tokenizer)
        except KeyError:
            known = ", ".join(ReasoningParserManager.list_registered())
            raise BadRequest(f"{where}: vLLM has no reasoning parser {name!r}; there are: {known}") from None
        except Exception as error:  # each parser raises its own for a tokenizer without its tokens
            shown = " ".join(str(error).split())
            raise BadRequest(f"{where}: {name!r} does not fit the model: {shown:.300}") from error
        message: Any = {"role": "user", "content": ""}
        self._request = self._parser.adjust_request(ChatCompletionRequest(messages=[message], model=""))

    def __call__(
        self, prompt: Sequence[int], output: Output, template_arguments: Mapping[str, Any] | None = None
    ) -> Split:
        parser = self._class(self._texts.tokenizer, chat_template_kwargs=dict(template_arguments or {}))
        text = output.text
        if self._request.skip_special_tokens is False:
            ids = output.token_ids
            if output.finish_reason == "stop" and ids and ids[-1] == self._texts.tokenizer.eos_token_id:
                ids = ids[:-1]
            text = self._texts.decode_after(self._texts.visible(prompt), ids, special=True)
        reasoning, content = parser.extract_reasoning(text, self._request)
        return Split(reasoning, content or "", parser.count_reasoning_tokens(output.token_ids))
