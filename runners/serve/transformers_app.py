"""Transformers' own server, as an application that a gate can stand before.

Its command builds the application and runs it in one step; here only its parts are used, so that the loading of the
model, the address, the key and the signals stay with the task.
"""

from __future__ import annotations

from typing import Any

from runners.api import Context
from runners.serve.gate import App, ServedModel
from runners.serve.task import ServeTask

PINNED = "served"
"""The name under which the application knows its one model; see `gate.Gate`."""


class TransformersServed:
    """A model in this process; see `served.Served`."""

    asks_usage = False

    def __init__(self, app: App, name: str, source: str) -> None:
        self.app = app
        self.models: tuple[ServedModel, ...] = (ServedModel(name=name, pinned=PINNED),)
        self.source = source

    @classmethod
    def load(cls, ctx: Context, task: ServeTask) -> TransformersServed:
        """Load the model, with its adapters merged. Errors as for `served.load`."""
        from runners.inference.loader import load_model
        from runners.inference.lora import apply_adapters
        from runners.inference.task_model import find_source
        from runners.models.adapters import load_adapters

        source = find_source(ctx, task.model)
        adapters = load_adapters(ctx, task.model.model.adapters)
        model, texts = load_model(ctx, task.model, source)
        return cls(build(apply_adapters(model, adapters), texts.tokenizer), task.name, source.shown)

    def failure(self) -> None:
        """It has no process of its own that could end."""

    def engine_numbers(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """It ends with this process."""


def build(model: Any, tokenizer: Any) -> App:
    """Make the server's application around a loaded model.

    Args:
        model: of Transformers, in evaluation mode.
        tokenizer: the model's.

    Raises:
        ImportError: FastAPI or uvicorn is not installed.
    """
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager, TimedModel
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState
    from transformers.utils import logging
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("Transformers' server needs FastAPI and uvicorn", name="fastapi")
    for name in ("chat_completion", "completion", "response", "transcription", "model_manager"):
        # It logs a line for each request.
        logging.get_logger(f"transformers.cli.serving.{name}").setLevel(logging.ERROR)
    models = ModelManager(device="cpu", trust_remote_code=False, model_timeout=-1)  # it loads nothing itself
    models.force_model = PINNED
    models.loaded_models[models.process_model_name(PINNED)] = TimedModel(model, timeout_seconds=-1, processor=tokenizer)
    state = GenerationState(continuous_batching=False, compile=False, cb_config=None)
    parts: dict[str, Any] = {"model_manager": models, "generation_state": state}
    app: App = build_server(
        models,
        ChatCompletionHandler(**parts, chat_template_kwargs={}),
        response_handler=ResponseHandler(**parts, chat_template_kwargs={}),
        completion_handler=CompletionHandler(**parts),
        transcription_handler=TranscriptionHandler(models, state),
        generation_state=state,
    )
    return app
