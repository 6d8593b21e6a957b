"""Transformers' own server, as an application that a gate can stand before.

Its command builds the application and runs it in one step; here only its parts are used, so that the address, the key
and the signals stay with the task.
"""

from __future__ import annotations

from typing import Any

from runners.serve.gate import App


def build(model: str, *, device: str = "cpu", dtype: str = "auto") -> App:
    """Load a model and make the server's application.

    Args:
        model: the model's folder or name. Requests that name another are refused with status 400.
        device: as torch names it.
        dtype: as Transformers names it.

    Raises:
        ImportError: FastAPI, uvicorn or another part of `transformers[serving]` is not installed.
    """
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("Transformers' server needs FastAPI and uvicorn: install fastapi and uvicorn")
    models = ModelManager(device=device, dtype=dtype, trust_remote_code=False, force_model=model)
    state = GenerationState(continuous_batching=False, compile=False, cb_config=None)
    parts: dict[str, Any] = {"model_manager": models, "generation_state": state}
    return build_server(
        models,
        ChatCompletionHandler(**parts, chat_template_kwargs={}),
        response_handler=ResponseHandler(**parts, chat_template_kwargs={}),
        completion_handler=CompletionHandler(**parts),
        transcription_handler=TranscriptionHandler(models, state),
        generation_state=state,
    )
