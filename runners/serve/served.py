"""A model behind its library's server: what the runner needs of it, whichever library that is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from runners.api import Context, RunnerError
from runners.inference.engines import choose
from runners.serve.gate import App, ServedModel
from runners.serve.task import ServeTask


class Served(Protocol):
    """A loaded model and the application that answers for it."""

    @property
    def app(self) -> App:
        """Runs on the event loop of the HTTP server, beginning with its lifespan."""

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """What requests may name; the first is announced."""

    @property
    def asks_usage(self) -> bool:
        """See `gate.Gate`."""

    @property
    def fields(self) -> Mapping[str, Collection[str]]:
        """See `gate.Gate`."""

    @property
    def source(self) -> str:
        """Where the weights came from, for the result."""

    def failure(self) -> RunnerError | None:
        """Why no request can be answered any more; None: nothing is known against it. Called several times a second."""

    def engine_numbers(self) -> dict[str, float]:
        """What the engine counts by itself, by name; empty: nothing. Any thread may call it."""

    def close(self) -> None:
        """End what the engine has started. The application gets no request any more."""


def load(ctx: Context, task: ServeTask) -> Served:
    """The task's model, loaded.

    Raises:
        BadRequest: it cannot be loaded here, or an option does not fit it or this node.
        MissingDependency: the engine's library is not installed.
        GpuOutOfMemory: the model does not fit.
        RunnerError: the model hub is unreachable.
    """
    if choose(ctx, task.model) == "vllm":
        from runners.serve import vllm_served

        return vllm_served.load(ctx, task)
    if task.serve.tool_call_parser is not None:
        ctx.unused.append("spec.serve.tool_call_parser (engine transformers)")
        ctx.report_unused()
    from runners.serve import transformers_served

    return transformers_served.load(ctx, task)
