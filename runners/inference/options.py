"""`spec.inference`: sampling options, their defaults, and the checks across fields."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runners.api import BadRequest
from runners.models.spec import Section

EngineName = Literal["auto", "vllm", "transformers"]
TokenId = Annotated[int, Meta(ge=0)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
LEAST_TEMPERATURE = 0.01
"""vLLM takes lower ones for this; far lower ones divide the scores beyond float32."""
MOST_PENALTY = 1000.0


class InferenceOptions(Section, frozen=True, rename={"system_prompt_alias": "systemPrompt"}):
    """spec.inference, as written"""

    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_new_tokens: Annotated[int, Meta(ge=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    stop: str | tuple[str, ...] | None = None
    stop_token_ids: tuple[TokenId, ...] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    bad_words: str | tuple[str, ...] | None = None
    logit_bias: dict[str | int, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    do_sample: bool | None = None
    system_prompt: str | None = None
    system_prompt_alias: str | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=1024)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat: bool | None = None
    reasoning_parser: Annotated[str, Meta(min_length=1)] | None = None
    """`think`, or one of vLLM's reasoning parsers."""
    json_schema: dict[str, Any] | str | None = None
    engine: EngineName | None = None
    enforce_cpu: bool | None = None


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling options with all defaults filled in. The same for all requests of a batch."""

    temperature: float
    """0: greedy."""
    top_p: float
    top_k: int
    """0: off."""
    max_tokens: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    """Generated tokens before which nothing ends the answer."""
    ignore_eos: bool = False
    bad_words: tuple[str, ...] = ()
    logit_bias: dict[int, float] = {}
    seed: int | None
    """Each request has its own generator with this seed, so that an answer does not depend on its batch."""
    n: int
    logprobs: int | None
    json_schema: dict[str, Any] | str | None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def sampling_of(options: InferenceOptions, where: str = "spec.inference") -> Sampling:
    """Fill in the defaults and check across fields.

    Raises:
        BadRequest: an empty string in `stop` or `bad_words`, a `min_tokens` above `max_tokens`, a `logit_bias` for
            what is no token id, or several answers of a greedy request.
    """
    stop = (options.stop,) if isinstance(options.stop, str) else options.stop or ()
    if "" in stop:
        raise BadRequest(f"{where}.stop: an empty string would stop everything at once; leave it out")
    temperature = 0.7 if options.temperature is None else options.temperature
    if not math.isfinite(temperature):
        raise BadRequest(f"{where}.temperature: expected a finite number (found {temperature})")
    if options.do_sample is False:
        temperature = 0.0
    if temperature > 0:
        temperature = max(temperature, LEAST_TEMPERATURE)
    n = options.n or 1
    bad_words = (options.bad_words,) if isinstance(options.bad_words, str) else options.bad_words or ()
    if any(not word.strip() for word in bad_words):
        raise BadRequest(f"{where}.bad_words: an empty string forbids nothing; leave it out")
    max_tokens = _or(options.max_new_tokens, _or(options.max_tokens, 512))
    if (options.min_tokens or 0) > max_tokens:
        raise BadRequest(f"{where}.min_tokens: {options.min_tokens} is more than max_tokens, {max_tokens}")
    if n > 1 and temperature == 0.0:
        raise BadRequest(
            f"{where}.n: {n} answers of a greedy request would all be the same; set n to 1, or a temperature above 0"
        )
    penalty = _or(options.repetition_penalty, 1.0)
    if not 1 / MOST_PENALTY <= penalty <= MOST_PENALTY:
        raise BadRequest(
            f"{where}.repetition_penalty: {penalty:g} leaves no scores to compare; give {1 / MOST_PENALTY:g} to "
            f"{MOST_PENALTY:g}"
        )
    return Sampling(
        temperature=temperature,
        top_p=1.0 if temperature == 0.0 else _or(options.top_p, 0.95),
        top_k=0 if temperature == 0.0 else max(options.top_k or 0, 0),
        max_tokens=max_tokens,
        presence_penalty=_or(options.presence_penalty, 0.0),
        frequency_penalty=_or(options.frequency_penalty, 0.0),
        repetition_penalty=penalty,
        stop=stop,
        stop_token_ids=options.stop_token_ids or (),
        min_tokens=options.min_tokens or 0,
        ignore_eos=bool(options.ignore_eos),
        bad_words=bad_words,
        logit_bias=_bias(options.logit_bias or {}, f"{where}.logit_bias"),
        seed=options.seed,
        n=n,
        logprobs=options.logprobs,
        json_schema=options.json_schema,
    )


def _bias(given: dict[str | int, float], where: str) -> dict[int, float]:
    """By token id; JSON writes the ids as strings."""
    for key in given:
        if not str(key).isdecimal():
            raise BadRequest(f"{where}.{key}: expected a token id, a whole number >= 0")
    return {int(key): value for key, value in given.items()}


def system_prompt_of(options: InferenceOptions, where: str = "spec.inference") -> str | None:
    """`system_prompt` under either name; None if absent or empty.

    Raises:
        BadRequest: both names are given, with different texts.
    """
    one, other = options.system_prompt, options.system_prompt_alias
    if one and other and one != other:
        raise BadRequest(f"{where}.systemPrompt: differs from {where}.system_prompt; give one of them")
    return one or other or None


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
