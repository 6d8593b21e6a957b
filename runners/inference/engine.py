"""Engine interface: requests, answers and progress, the same for vLLM and Transformers.

`tokens.Texts` encodes prompts and decodes answers for both, so that they cannot differ in text.
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
    ends: tuple[int, ...] = ()
    """Tokens that end the answer besides the model's: of its adapters."""


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
    """All generated tokens, including an end token or stop string that `text` excludes."""
    finish_reason: FinishReason | SkippedReason
    logprobs: tuple[TokenLogprob, ...] | None = None


class Completion(msgspec.Struct, frozen=True):
    """The answers to one request: as many as Sampling.n."""

    outputs: tuple[Output, ...]


class Watch:
    """Reports progress to the node, and checks for cancellation."""

    def __init__(self, ctx: Context, prompts: int, copies: int = 1) -> None:
        """
        Args:
            copies: answers to each prompt; a prompt is done when it has them all.
        """
        self._ctx = ctx
        self._prompts = prompts
        self._copies = copies
        self._since = time.monotonic()
        self.answers = 0
        self.tokens = 0

    def step(self, *, tokens: int = 0, answers: int = 0) -> None:
        """Add what was generated and finished since the last call. Call it every few tokens.

        Raises:
            Cancelled: the node asked the task to stop.
        """
        self.tokens += tokens
        self.answers += answers
        rate = self.tokens / max(time.monotonic() - self._since, 1e-9)
        done = self.answers // self._copies
        self._ctx.progress(done, self._prompts, "prompts", tokens=float(self.tokens), tokens_per_s=round(rate, 1))

    def rewind(self, *, tokens: int, answers: int) -> None:
        """Reset the counts to earlier values, because a batch is generated again."""
        self.tokens, self.answers = tokens, answers


class Engine(Protocol):
    """A loaded model."""

    name: str
    max_positions: int | None
    """Tokens that prompt and answer may have together; None: not known."""
    vocabulary: int | None
    """Tokens that the model has embeddings for, by ids from 0; None: not known."""

    def generate(self, requests: list[Request], sampling: Sampling, watch: Watch) -> list[Completion]:
        """Answer every request; completions are in the requests' order.

        Raises:
            GpuOutOfMemory: the device has too little memory even for one request at a time.
            BadRequest: the model computes NaN or infinity.
            Cancelled: raised by `watch`.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Device, dtype and the like, for the log."""
        ...
