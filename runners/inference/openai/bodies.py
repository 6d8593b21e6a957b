"""The fields of a request's body: those that are honoured, those without effect, and those that are refused by name.

Names and defaults are those of vLLM's server, which has OpenAI's and some of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from flowmesh.validation.convert import FieldError, convert
from runners.api import BadRequest
from runners.inference.openai.lines import LineFault
from runners.inference.options import InferenceOptions, Penalty, Sampling, TokenId, sampling_of
from runners.models.spec import Section

UNBOUNDED = 2**31 - 1
"""`max_tokens` of a request that gives none: as many as the model has positions for."""
COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions."""

WITHOUT_EFFECT = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "request_id", "session_id", "priority", "cache_salt", "parallel_tool_calls",
})  # fmt: skip
"""Fields that concern a server's accounting, cache or schedule and change no answer."""
REFUSED: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "tools": (),
    "tool_choice": ("none",),
    "functions": (),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": (),
    "best_of": (1,),
    "suffix": (),
    "echo": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "min_p": (0,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "logprob_token_ids": (),
    "allowed_token_ids": (),
    "structured_outputs": (),
    "documents": (),
    "chat_template": (),
    "prompt_embeds": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_prompt_text": (False,),
    "thinking_token_budget": (-1,),
    "repetition_detection": (),
    "mm_processor_kwargs": (),
    "media_io_kwargs": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
}
"""Fields of OpenAI or vLLM that no engine here honours, with the values that ask for nothing."""
_REASONS = {
    "stream": "a batch file's answers are not streamed; leave it out",
    "tools": "calls of tools are not parsed here; leave it out, or use a task of type agent",
}
DEFAULTS = frozenset({
    "temperature", "top_p", "top_k", "max_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "stop", "stop_token_ids", "min_tokens", "ignore_eos", "bad_words", "logit_bias", "seed",
})  # fmt: skip
"""Fields of `spec.inference` that a line may leave to the task."""

Count = Annotated[int, Meta(ge=1)]
Text = str | tuple[str, ...]


class Body(Section, frozen=True):
    """What both kinds of requests have."""

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Meta(ge=1, le=1024)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop: Text | None = None
    stop_token_ids: tuple[TokenId, ...] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    bad_words: Text | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    response_format: dict[str, Any] | None = None
    add_special_tokens: bool | None = None


class ChatBody(Body, frozen=True, kw_only=True):
    """Of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = None


class CompletionBody(Body, frozen=True, kw_only=True):
    """Of /v1/completions."""

    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


def read_body(given: Mapping[str, Any], into: type[Any]) -> Any:
    """A request's body, checked. Null means absent.

    Raises:
        LineFault: naming the first field that is wrong; the message has all of them.
    """
    known = into.__struct_fields__
    body = {
        name: value for name, value in given.items()
        if value is not None and (name not in WITHOUT_EFFECT or name in known)
    }  # fmt: skip
    for name in [name for name in body if name in REFUSED and name not in known]:
        if not _asks_for_nothing(name, body.pop(name)):
            raise LineFault(f"body.{name}: {_REASONS.get(name, 'not supported here; leave it out')}", param=name)
    try:
        return convert(body, into, where="body")
    except FieldError as error:
        raise LineFault(str(error), param=error.path.removeprefix("body.")) from None


def not_honoured(given: Mapping[str, Any], known: Collection[str]) -> str | None:
    """The first field of a body that asks for something, and that its server does not read; None: there is none.

    Args:
        known: fields that the server reads.
    """
    return next(
        (
            name for name, value in given.items()
            if name not in known and name not in WITHOUT_EFFECT and value is not None
            and not (name in REFUSED and _asks_for_nothing(name, value))
        ),
        None,
    )  # fmt: skip


def _asks_for_nothing(name: str, value: Any) -> bool:
    return value in ([], {}) or any(_same(value, each) for each in REFUSED[name])


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


class Defaults(msgspec.Struct, frozen=True):
    """What requests get that they leave out, by the names of `spec.inference`. The task's come first."""

    task: dict[str, Any] = {}
    model: dict[str, Any] = {}
    """By its generation_config.json."""


def sampling(body: Body, defaults: Defaults) -> Sampling:
    """A request's sampling.

    Raises:
        LineFault: the fields exclude each other, or `response_format` is wrong.
    """
    given = {name: getattr(body, name) for name in DEFAULTS}
    model = dict(defaults.model)
    if isinstance(body, ChatBody):
        given["max_tokens"] = body.max_completion_tokens or body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            raise LineFault("body.top_logprobs: goes with `logprobs: true`", param="top_logprobs")
    else:
        assert isinstance(body, CompletionBody)
        logprobs = body.logprobs
        model["max_tokens"] = COMPLETION_TOKENS
    merged: dict[str, Any] = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": UNBOUNDED,
        **model, **defaults.task, **{name: value for name, value in given.items() if value is not None},
    }  # fmt: skip
    schema = _schema(body.response_format)
    try:
        return sampling_of(InferenceOptions(**merged, n=body.n, logprobs=logprobs, json_schema=schema), "body")
    except BadRequest as error:
        raise LineFault(str(error), param=str(error).removeprefix("body.").partition(":")[0]) from None


def _schema(wanted: dict[str, Any] | None) -> dict[str, Any] | None:
    kind = None if wanted is None else wanted.get("type")
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise LineFault(
            f"body.response_format.type: expected text, json_object or json_schema (found {kind!r:.80})",
            param="response_format",
        )
    given = wanted.get("json_schema")
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        raise LineFault("body.response_format.json_schema.schema: expected an object", param="response_format")
    return schema
