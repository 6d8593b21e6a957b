"""A model behind its library's server: what the runner needs of it, whichever library that is."""

from __future__ import annotations

from typing import Protocol

from runners.api import Context, RunnerError
from runners.serve.gate import App
from runners.serve.task import ServeTask


class Served(Protocol):
    """A loaded model and the application that answers for it."""

    app: App
    """Runs on the event loop of the HTTP server, beginning with its lifespan."""
    pinned: str
    """The model's name for the application; see `gate.Gate`."""
    source: str
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
    from runners.serve.transformers_app import TransformersServed

    return TransformersServed.load(ctx, task)
