"""Lines of `output.jsonl` and `errors.jsonl`, with the fields that `vllm run-batch` writes.

Shapes: `ChatCompletionResponse`, `CompletionResponse` and `BatchRequestOutput` of vLLM 0.32. Fields that vLLM has and
nothing fills are null there and here.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from runners.inference.engine import Completion, Output, TokenLogprob
from runners.inference.openai.lines import LineFault
from runners.inference.options import Sampling
from runners.inference.reasoning import Splitter
from runners.inference.tokens import Texts

LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON does not have."""


def served(custom_id: str, body: dict[str, Any]) -> dict[str, Any]:
    """The line of a request that was answered."""
    response = {"status_code": 200, "request_id": f"flowmesh-batch-{uuid.uuid4().hex}", "body": body}
    return {"id": f"flowmesh-{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}


def refused(fault: LineFault, where: str) -> dict[str, Any]:
    """The line of a request that cannot be served."""
    response = {"status_code": fault.status, "request_id": f"flowmesh-batch-{uuid.uuid4().hex}", "body": None}
    kind = {404: "NotFoundError", 500: "InternalServerError"}.get(fault.status, "BadRequestError")
    error = {"message": f"{where}: {fault.message}", "type": kind, "param": fault.param, "code": fault.status}
    line = {"id": f"flowmesh-{uuid.uuid4().hex}", "custom_id": fault.custom_id, "response": response}
    return {**line, "error": {"error": error}}


class Answers:
    """Makes the bodies of answers.

    Args:
        ends: tokens that end an answer besides the tokenizer's own end token and those of the request.
        split: takes the reasoning out of an answer; None: the task does not ask for it.
        fingerprint: of engine and model.
    """

    def __init__(
        self,
        texts: Texts,
        ends: frozenset[int],
        split: Splitter | None,
        fingerprint: str,
    ) -> None:
        self._texts = texts
        self._ends = ends
        self._split = split
        self._fingerprint = fingerprint

    def chat(
        self,
        model: str,
        prompt: tuple[int, ...],
        sampling: Sampling,
        completion: Completion,
        template_arguments: Mapping[str, Any],
        *,
        with_reasoning: bool = True,
    ) -> dict[str, Any]:
        """The body of a chat's answer.

        Args:
            template_arguments: what the request gave to the chat template; some reasoning parsers depend on it.
            with_reasoning: False: it is taken out and not shown, and neither are logprobs, which would show it.
        """
        choices, thought = [], 0
        for index, output in enumerate(completion.outputs):
            stop_reason = self._stop_reason(output, sampling)
            content: str | None = _whole_characters(output.text, stop_reason)
            given = msgspec.structs.replace(output, text=content)
            found = None if self._split is None else self._split(prompt, given, template_arguments)
            reasoning = None
            hidden = found is not None and not with_reasoning
            if found is not None:
                thought += found.tokens
                content = found.text or None if found.reasoning is not None else found.text
                reasoning = found.reasoning if with_reasoning else None
            choices.append({
                "index": index,
                "message": {
                    "role": "assistant", "content": content, "refusal": None, "annotations": None, "audio": None,
                    "function_call": None, "reasoning": reasoning,
                },
                "logprobs": None if hidden else self._logprobs(output, sampling.logprobs, chat=True),
                "finish_reason": output.finish_reason,
                "stop_reason": stop_reason,
                "token_ids": None,
                "routed_experts": None,
            })  # fmt: skip
        body = self._body(self.head(model, chat=True), choices, [prompt], [completion])
        if self._split is not None:
            body["usage"]["completion_tokens_details"] = {"reasoning_tokens": thought}
        return {
            **body, "prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None,
            "kv_transfer_params": None, "ec_transfer_params": None, "metrics": None,
        }  # fmt: skip

    def completion(
        self, model: str, prompts: Sequence[tuple[int, ...]], sampling: Sampling, completions: Sequence[Completion]
    ) -> dict[str, Any]:
        """The body of the answer to one or several prompts, each with as many choices as `n`."""
        outputs = [output for completion in completions for output in completion.outputs]
        reasons = [self._stop_reason(output, sampling) for output in outputs]
        choices = [
            {
                "index": index,
                "text": _whole_characters(output.text, reason),
                "logprobs": self._logprobs(output, sampling.logprobs, chat=False),
                "finish_reason": output.finish_reason,
                "stop_reason": reason,
                "token_ids": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "routed_experts": None,
            }
            for index, (output, reason) in enumerate(zip(outputs, reasons, strict=True))
        ]
        body = self._body(self.head(model, chat=False), choices, prompts, completions)
        return {**body, "kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}

    def head(self, model: str, *, chat: bool, part: bool = False) -> dict[str, Any]:
        """What all answers begin with.

        Args:
            part: of a stream.
        """
        kind = "text_completion" if not chat else "chat.completion.chunk" if part else "chat.completion"
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": self._fingerprint,
        }

    def _body(
        self,
        head: dict[str, Any],
        choices: list[dict[str, Any]],
        prompts: Sequence[tuple[int, ...]],
        completions: Sequence[Completion],
    ) -> dict[str, Any]:
        asked = sum(map(len, prompts))
        answered = sum(len(output.token_ids) for completion in completions for output in completion.outputs)
        return {
            **head,
            "choices": choices,
            "service_tier": None,
            "usage": {
                "prompt_tokens": asked, "total_tokens": asked + answered, "completion_tokens": answered,
                "prompt_tokens_details": None, "completion_tokens_details": None,
            },
        }  # fmt: skip

    def _stop_reason(self, output: Output, sampling: Sampling) -> int | str | None:
        """The stop string or token that ended an answer; None for the model's own end token, and for `length`."""
        if output.finish_reason != "stop" or not output.token_ids:
            return None
        last = output.token_ids[-1]
        if not sampling.ignore_eos and last == self._texts.tokenizer.eos_token_id:
            return None
        if last in sampling.stop_token_ids or (last in self._ends and not sampling.ignore_eos):
            return last
        written = self._texts.token(last)
        if written in sampling.stop:  # a special token, which no text shows
            return written
        whole = self._texts.decode_after((), output.token_ids)
        ending = [each for each in sampling.stop if whole.startswith(each, len(output.text))]
        return next(iter(ending or [each for each in sampling.stop if each in whole] or sampling.stop), None)

    def _logprobs(self, output: Output, count: int | None, *, chat: bool) -> dict[str, Any] | None:
        return None if count is None else self.logprobs(output.logprobs or (), count, chat=chat)

    def logprobs(self, steps: Sequence[TokenLogprob], count: int, *, chat: bool) -> dict[str, Any]:
        """Those of an answer's tokens, or of some that follow each other.

        Args:
            count: of the most likely tokens at each place.
        """
        if chat:
            return {
                "content": [
                    {**self._token(each.token_id, each.logprob),
                     "top_logprobs": [self._token(*pair) for pair in _ranked(each)[:count]]}
                    for each in steps
                ]
            }  # fmt: skip
        tokens = [self._texts.token(each.token_id) for each in steps]
        return {
            "text_offset": [0, *itertools.accumulate(map(len, tokens))][: len(tokens)],
            "token_logprobs": [_shown(each.logprob) for each in steps],
            "tokens": tokens,
            "top_logprobs": [
                {self._texts.token(token): _shown(logprob) for token, logprob in _ranked(each)[: count + 1]}
                for each in steps
            ],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._texts.token(token_id)
        return {"token": token, "logprob": _shown(logprob), "bytes": list(token.encode("utf-8", errors="replace"))}


def _whole_characters(text: str, stop_reason: int | str | None) -> str:
    """A text without the bytes of a character that the answer's end cuts, as vLLM gives it."""
    return text if isinstance(stop_reason, str) else text.rstrip("\ufffd")


def _shown(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _ranked(step: TokenLogprob) -> list[tuple[int, float]]:
    """The token that was drawn, then the most likely others: the order of vLLM's lists."""
    return [(step.token_id, step.logprob), *(pair for pair in step.top if pair[0] != step.token_id)]
