"""Engine interface: requests, answers and progress, the same for vLLM and Transformers.

`tokens.Texts` encodes prompts and decodes answers for both, so that they cannot differ in text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec

from flowmesh.messages.job import Fault
from runners.api import Context, RunnerError
from runners.data.content import ImagePart
from runners.inference.options import Sampling

FinishReason = Literal["stop", "length"]
SkippedReason = Literal["blank"]
"""Of an item that was not sent to the model: its prompt is empty or white space."""


class GpuOutOfMemory(RunnerError):
    """The device has too little memory for the model or for one prompt."""

    fault = Fault.GPU_OOM


class Pictures(msgspec.Struct, frozen=True):
    """A prompt with images."""

    images: tuple[ImagePart, ...]
    text: str
    """As the chat template writes it, with one mark where each image goes."""
    marked_ids: tuple[int, ...]
    """The tokens of that text."""
    token_ids: tuple[int, ...]
    """As the model gets them: with as many tokens for each image as it has features."""
    where: str
    """The prompt's name in errors."""

    @property
    def pixels(self) -> int:
        """Of all its images together."""
        return sum(each.width * each.height for each in self.images)


class Request(msgspec.Struct, frozen=True):
    """One prompt."""

    token_ids: tuple[int, ...]
    sampling: Sampling
    """Requests of one batch may differ in it."""
    adapter: str | None = None
    """Name of the runtime adapter that answers; None: the base model."""
    ends: tuple[int, ...] = ()
    """Tokens that end the answer besides the model's: of its adapters."""
    pictures: Pictures | None = None
    """The images in it; `token_ids` has their tokens."""


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


class Same:
    """A function of the sampling, computed once where consecutive requests have the same one, as most tasks' do."""

    def __init__(self, function: Callable[[Sampling], Any]) -> None:
        self._function = function
        self._last: tuple[Sampling, Any] | None = None

    def __call__(self, sampling: Sampling) -> Any:
        if self._last is None or (self._last[0] is not sampling and self._last[0] != sampling):
            self._last = sampling, self._function(sampling)
        return self._last[1]


Finished = Callable[[int, Completion], None]
"""Called by an engine on its caller's thread when a request has all its answers, with the request's position."""


class Watch:
    """Reports progress to the node, and checks for cancellation."""

    def __init__(self, ctx: Context, prompts: int, done: int = 0) -> None:
        """
        Args:
            prompts: of the task.
            done: how many of them are answered already.
        """
        self._ctx = ctx
        self._prompts = prompts
        self._since = time.monotonic()
        self.done = done
        """Counted by the owner of the prompts, as they are finished."""
        self.tokens = 0

    def step(self, *, tokens: int = 0) -> None:
        """Add what was generated since the last call. Engines call it every few tokens, after `finished`.

        Raises:
            Cancelled: the node asked the task to stop.
        """
        self.tokens += tokens
        rate = self.tokens / max(time.monotonic() - self._since, 1e-9)
        self._ctx.progress(self.done, self._prompts, "prompts", tokens=float(self.tokens), tokens_per_s=round(rate, 1))

    def rewind(self, *, tokens: int) -> None:
        """Reset the tokens to an earlier count, because a batch is generated again."""
        self.tokens = tokens


def collect(engine: Engine, requests: Sequence[Request], watch: Watch) -> list[Completion]:
    """All answers of an engine, in the requests' order. Errors as in `Engine.generate`."""
    answers: dict[int, Completion] = {}
    engine.generate(requests, watch, answers.__setitem__)
    return [answers[number] for number in range(len(requests))]


class Engine(Protocol):
    """A loaded model."""

    name: str
    max_positions: int | None
    """Tokens that prompt and answer may have together; None: not known."""
    vocabulary: int | None
    """Tokens that the model has embeddings for, by ids from 0; None: not known."""

    def generate(self, requests: Sequence[Request], watch: Watch, finished: Finished) -> None:
        """Answer every request, and hand out each answer as soon as it is complete, in any order.

        Args:
            finished: called once for each request. What it raises ends the generation.

        Raises:
            GpuOutOfMemory: the device has too little memory even for one request at a time.
            BadRequest: the model computes NaN or infinity.
            Cancelled: raised by `watch`.
        """
        ...

    def check(self, sampling: Sampling, where: str) -> None:
        """Raises BadRequest for sampling that this engine cannot honour; `where` is its place, for the error."""
        ...

    def describe(self) -> dict[str, Any]:
        """Device, dtype and the like, for the log."""
        ...
