"""Answers requests with a model of Transformers, one after another, in a thread of its own.

The thread alone uses tokenizer, processor and model.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from runners.api import Context, RunnerError
from runners.inference.engine import Completion, GpuOutOfMemory, Request, TokenLogprob, Watch
from runners.inference.openai.lines import LineFault
from runners.inference.openai.prompts import Prompts
from runners.inference.openai.requests import requests_of
from runners.inference.tokens import Texts
from runners.inference.transformers_engine import TransformersEngine
from runners.models.adapters import LocalAdapter
from runners.serve.asked import Ask


class Begun(msgspec.Struct, frozen=True):
    """The request fits the model; its answer is being generated."""


class Refused(msgspec.Struct, frozen=True):
    """The request is not answered, or not to its end."""

    message: str
    status: int
    param: str | None = None


Event = Begun | Refused | dict[str, Any]
"""A dict is one that the reply has made."""


class Reply(Protocol):
    """Makes what a client gets. Used by the generator's thread."""

    def begin(self, requests: Sequence[Request]) -> list[dict[str, Any]]: ...

    def grow(
        self, number: int, copy: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]
    ) -> list[dict[str, Any]]:
        """Only called for streams."""
        ...

    def end(self, completions: Sequence[Completion]) -> list[dict[str, Any]]: ...


class Job:
    """One request.

    Args:
        reply: makes the events.
        tell: called with each event, by the generator's thread. The last one is None.
    """

    def __init__(self, ask: Ask, reply: Reply, tell: Callable[[Event | None], None]) -> None:
        self.ask = ask
        self.reply = reply
        self.tell = tell
        self.gone = threading.Event()
        """Set when nobody waits for the answer any more."""


class _Gone(Exception):
    """The client has left."""


class _Watch(Watch):
    """Ends a generation whose client has left."""

    def __init__(self, ctx: Context, job: Job, closed: threading.Event) -> None:
        super().__init__(ctx, 1)
        self._job = job
        self._closed = closed

    def step(self, *, tokens: int = 0) -> None:
        self.tokens += tokens
        if self._job.gone.is_set() or self._closed.is_set():
            raise _Gone


class Generator:
    """
    Args:
        adapters: the model's.
    """

    def __init__(
        self, ctx: Context, engine: TransformersEngine, texts: Texts, adapters: Sequence[LocalAdapter]
    ) -> None:
        self._ctx = ctx
        self._engine = engine
        self._texts = texts
        self._prompts = Prompts(texts)
        self._adapters = adapters
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="generator")
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def put(self, job: Job) -> None:
        self._jobs.put(job)

    def waiting(self) -> int:
        """Requests that are not being answered yet."""
        return self._jobs.qsize()

    def close(self) -> None:
        """End what is being generated; no request is answered any more."""
        self._closed.set()
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closed.is_set():
            try:
                if not job.gone.is_set():
                    self._answer(job)
            except _Gone:
                pass
            except LineFault as fault:
                job.tell(Refused(fault.message, fault.status, fault.param))
            except GpuOutOfMemory as error:
                job.tell(Refused(f"{error}; send a shorter one, or ask for a shorter answer", 400))
            except RunnerError as error:
                self._ctx.log.error("request failed: %s", error)
                job.tell(Refused(str(error), 500))
            except Exception:
                self._ctx.log.exception("unhandled error in a request")
                job.tell(Refused("the request failed; see the task's log", 500))
            finally:
                job.tell(None)

    def _answer(self, job: Job) -> None:
        requests = requests_of(job.ask.asked, self._prompts, self._engine, self._texts, self._adapters)
        answers: dict[int, Completion] = {}

        def tell(events: Sequence[Event]) -> None:
            for event in events:
                job.tell(event)

        def grown(number: int, copy: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
            tell(job.reply.grow(number, copy, tokens, logprobs))

        tell([Begun(), *job.reply.begin(requests)])
        watch = _Watch(self._ctx, job, self._closed)
        self._engine.generate(requests, watch, answers.__setitem__, grown if job.ask.stream else None)
        tell(job.reply.end([answers[number] for number in range(len(requests))]))
