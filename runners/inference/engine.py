"""What an engine is given and what it gives back, the same for vLLM and Transformers.

Prompts arrive as token ids and leave as token ids plus text, both made by `tokens.Texts`, so that the engines cannot
differ in how they read or write text.
"""

from __future__ import annotations

import time
from typing import Any, Literal, Protocol

import msgspec

from flowmesh.messages.job import Fault
from runners.api import Context, RunnerError
from runners.inference.options import Sampling

FinishReason = Literal["stop", "length"]
SkippedReason = Literal["blank"]
"""Of an item that was not sent to the model: its prompt is empty or white space."""


class GpuOutOfMemory(RunnerError):
    """The device has too little memory for the model or for one prompt."""

    fault = Fault.GPU_OOM


class Request(msgspec.Struct, frozen=True):
    """One prompt."""

    token_ids: tuple[int, ...]
    adapter: str | None = None
    """Name of the runtime adapter that answers; None: the base model."""


class TokenLogprob(msgspec.Struct, frozen=True):
    """One generated token's natural-log probability under the model, before temperature and penalties."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, best first."""


class Output(msgspec.Struct, frozen=True):
    """One answer."""

    text: str
    token_ids: tuple[int, ...]
    """Everything generated, with an end-of-sequence token or stop string that `text` is cut before."""
    finish_reason: FinishReason | SkippedReason
    logprobs: tuple[TokenLogprob, ...] | None = None


class Completion(msgspec.Struct, frozen=True):
    """The answers to one request: as many as Sampling.n."""

    outputs: tuple[Output, ...]


class Watch:
    """Tells the node how far a generation is, and stops it where the node wants it stopped."""

    def __init__(self, ctx: Context, prompts: int, copies: int = 1) -> None:
        """
        Args:
            copies: answers to each prompt; a prompt counts as done when it has as many.
        """
        self._ctx = ctx
        self._prompts = prompts
        self._copies = copies
        self._since = time.monotonic()
        self.answers = 0
        self.tokens = 0

    def step(self, *, tokens: int = 0, answers: int = 0) -> None:
        """Count what was generated and finished since the last call. Call it every few tokens.

        Raises:
            Cancelled: the node asked the task to stop.
        """
        self.tokens += tokens
        self.answers += answers
        rate = self.tokens / max(time.monotonic() - self._since, 1e-9)
        done = self.answers // self._copies
        self._ctx.progress(done, self._prompts, "prompts", tokens=float(self.tokens), tokens_per_s=round(rate, 1))

    def rewind(self, *, tokens: int, answers: int) -> None:
        """Forget what was counted since `tokens` and `answers` were read: it has to be generated again."""
        self.tokens, self.answers = tokens, answers


class Engine(Protocol):
    """A loaded model."""

    name: str
    max_positions: int | None
    """Tokens that prompt and answer may have together; None: not known."""
    vocabulary: int | None
    """Tokens that the model has embeddings for, by ids from 0; None: not known."""

    def generate(self, requests: list[Request], sampling: Sampling, watch: Watch) -> list[Completion]:
        """Answer every request; the completions stand in the requests' order.

        Raises:
            GpuOutOfMemory: the device has too little memory even for one request at a time.
            BadRequest: the model computes NaN or infinity.
            Cancelled: by way of `watch`.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the result and the log say about the engine: device, dtype and the like."""
        ...
