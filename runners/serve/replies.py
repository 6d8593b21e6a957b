"""What a client gets for its request: one body, or the parts of a stream whose sum is that body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from runners.inference.engine import Completion, Output, Request, TokenLogprob
from runners.inference.openai.answers import Answers
from runners.inference.openai.prompts import template_arguments
from runners.inference.tokens import Texts
from runners.serve.asked import Ask
from runners.serve.calls import Message, Piece
from runners.serve.growing import Growing

Body = dict[str, Any]


class Replies:
    """Makes replies to requests.

    Args:
        template: how the model writes its messages (`calls.template_of`); None: as text alone.
    """

    def __init__(self, texts: Texts, answers: Answers, template: Body | None) -> None:
        self.texts = texts
        self.answers = answers
        self.template = template

    def to(self, ask: Ask) -> Reply:
        return Reply(self, ask)


class _Choice:
    """One answer, as far as it was sent."""

    def __init__(self, growing: Growing, message: Message | None) -> None:
        self.growing = growing
        self.message = message
        self.told = 0
        """Tokens whose logprobs were sent."""
        self.offset = 0
        """Characters of these tokens."""


class Reply:
    """See `generator.Reply`."""

    def __init__(self, of: Replies, ask: Ask) -> None:
        self._of = of
        self._ask = ask
        self._asked = ask.asked
        self._requests: Sequence[Request] = ()
        self._choices: list[_Choice] = []
        self._head: Body = {}

    @property
    def _hides_reasoning(self) -> bool:
        return self._ask.chat is not None and self._ask.chat.include_reasoning is False

    def begin(self, requests: Sequence[Request]) -> list[Body]:
        self._requests = requests
        self._choices = [self._choice(each) for each in requests for _ in range(each.sampling.n)]
        if not self._ask.stream:
            return []
        self._head = self._of.answers.head(self._asked.model, chat=self._ask.chat is not None, part=True)
        if self._ask.chat is None:
            return []
        first = {"role": "assistant", "content": ""}
        return [self._part(index, first, None) for index in range(len(self._choices))]

    def grow(self, number: int, copy: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> list[Body]:
        index = number * self._asked.sampling.n + copy
        choice = self._choices[index]
        text = choice.growing.add(tokens)
        piece = Piece(content=text) if choice.message is None else choice.message.add(text)
        if piece == Piece():
            return []
        return self._parts(index, piece, self._logprobs(choice, logprobs[choice.told :]))

    def end(self, completions: Sequence[Completion]) -> list[Body]:
        body = self._body(completions)
        outputs = [output for completion in completions for output in completion.outputs]
        events: list[Body] = []
        for index, (output, whole) in enumerate(zip(outputs, body["choices"], strict=True)):
            choice = self._choices[index]
            if choice.message is None:
                text = whole["message"]["content"] if self._ask.chat is not None else whole["text"]
                piece = Piece(content=choice.growing.rest(text))
            else:
                piece = self._message_end(choice, choice.message, output, whole)
            if not self._ask.stream:
                continue
            more = self._logprobs(choice, (output.logprobs or ())[choice.told :])
            if piece != Piece() or more:
                events += self._parts(index, piece, more)
            ended = {name: whole[name] for name in ("finish_reason", "stop_reason")}
            events.append(self._part(index, {}, None) if self._ask.chat else self._part(index, "", None))
            events[-1]["choices"][0] |= ended
        if not self._ask.stream:
            return [body]
        if self._ask.usage:
            events.append({**self._head, "choices": [], "usage": body["usage"]})
        return events

    def _choice(self, request: Request) -> _Choice:
        texts, template = self._of.texts, self._of.template
        stop = request.sampling.stop
        if self._ask.chat is None or template is None:
            return _Choice(Growing(texts, request.token_ids, texts.resolved(request.sampling).stop), None)
        prompt = texts.decode_after((), request.token_ids, special=True)
        message = Message(template, prompt, self._asked.tools, one_call=self._ask.one_call)
        return _Choice(Growing(texts, request.token_ids, stop, special=True), message)

    def _body(self, completions: Sequence[Completion]) -> Body:
        prompts = [each.token_ids for each in self._requests]
        answers, sampling = self._of.answers, self._asked.sampling
        if (chat := self._ask.chat) is None:
            return answers.completion(self._asked.model, prompts, sampling, completions)
        return answers.chat(self._asked.model, prompts[0], sampling, completions[0], template_arguments(chat))

    def _message_end(self, choice: _Choice, message: Message, output: Output, whole: Body) -> Piece:
        """The rest of a message, whose whole is put into `whole` where it was not streamed."""
        tokens = output.token_ids
        text = self._of.texts.decode_after(self._of.texts.visible(self._requests[0].token_ids), tokens, special=True)
        if isinstance(whole["stop_reason"], str):
            at = text.find(whole["stop_reason"], len(choice.growing.sent))
            text = text[:at] if at >= 0 else text
        elif output.finish_reason == "stop":
            end = self._of.texts.decode_after((), tokens[-1:], special=True)
            text = text.removesuffix(end)
        pieces = [message.add(choice.growing.rest(text.rstrip("\ufffd"))), message.end()]
        piece = Piece(
            content="".join(each.content for each in pieces),
            reasoning="".join(each.reasoning for each in pieces),
            calls=tuple(call for each in pieces for call in each.calls),
        )
        if message.calls and whole["finish_reason"] == "stop":
            whole["finish_reason"] = "tool_calls"
        whole["message"] |= {"content": piece.content, "reasoning": piece.reasoning or None}
        if piece.calls:
            calls = [{name: each for name, each in call.items() if name != "index"} for call in piece.calls]
            whole["message"] |= {"content": piece.content or None, "tool_calls": calls}
        if piece.reasoning and self._hides_reasoning:
            whole["message"]["reasoning"] = whole["logprobs"] = None
        return piece

    def _logprobs(self, choice: _Choice, steps: Sequence[TokenLogprob]) -> Body | None:
        count = self._asked.sampling.logprobs
        if count is None or not steps:
            return None
        choice.told += len(steps)
        made = self._of.answers.logprobs(tuple(steps), count, chat=self._ask.chat is not None)
        if "text_offset" in made:
            made["text_offset"] = [each + choice.offset for each in made["text_offset"]]
            choice.offset += sum(map(len, made["tokens"]))
        return made

    def _parts(self, index: int, piece: Piece, logprobs: Body | None) -> list[Body]:
        if self._ask.chat is None:
            return [self._part(index, piece.content, logprobs)]
        deltas: list[Body] = []
        if piece.reasoning and self._hides_reasoning:
            logprobs = None
        elif piece.reasoning:
            deltas.append({"reasoning": piece.reasoning})
        if piece.content or (logprobs is not None and not deltas and not piece.calls):
            deltas.append({"content": piece.content})
        if piece.calls:
            deltas.append({"tool_calls": list(piece.calls)})
        return [self._part(index, delta, logprobs if number == 0 else None) for number, delta in enumerate(deltas)]

    def _part(self, index: int, shown: Any, logprobs: Body | None) -> Body:
        field = "text" if self._ask.chat is None else "delta"
        choice = {"index": index, field: shown, "logprobs": logprobs, "finish_reason": None}
        return {**self._head, "choices": [choice]}


def encode(event: Body) -> bytes:
    """An event of a stream."""
    return b"data: " + msgspec.json.encode(event) + b"\n\n"
