"""vLLM's own server, as an application that a gate can stand before.

Its command parses arguments, binds, and takes over the signals of its process; here only the application is used.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import MutableMapping, Sequence
from types import SimpleNamespace
from typing import Any

from runners.inference.vllm_finite import FiniteLogits
from runners.models.adapters import LocalAdapter
from runners.serve.gate import App, Receive, Send


class VllmApp:
    """An ASGI application that is built when its lifespan begins, on the event loop that the engine then belongs to.

    Attributes:
        error: why it could not be built. The server ends then.
    """

    def __init__(self, engine: Any, arguments: Namespace, *, checks_logits: bool) -> None:
        self._engine = engine
        self._arguments = arguments
        self._checks_logits = checks_logits
        self._app: App | None = None
        self.error: Exception | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if self._app is None:
            try:
                self._app = await self._build()
            except Exception as error:  # noqa: BLE001 - `VllmServed.failure` makes a verdict of it
                self.error = error
                await receive()
                await send({"type": "lifespan.startup.failed", "message": "the application was not built"})
                return
        await self._app(scope, receive, send)

    async def _build(self) -> App:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        engine = self._engine
        if self._checks_logits:
            await engine.collective_rpc(FiniteLogits.flowmesh_check_logits.__name__)
        await engine.reset_mm_cache()  # what it was measured with
        tasks = await engine.get_supported_tasks()
        app = build_app(self._arguments, tasks, engine.model_config)
        await init_app_state(engine, app.state, self._arguments, tasks)
        app.state.server = SimpleNamespace(should_exit=False)  # set when the engine died; `VllmServed.failure` notices
        built: App = app
        return built


def request_fields(*, calls_tools: bool) -> dict[str, frozenset[str]]:
    """The fields that vLLM's server reads, by path. It takes others with a line in its log.

    Args:
        calls_tools: whether it reads the model's calls of tools; for chats it refuses tools by itself if not.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    kinds: dict[str, Any] = {
        "/v1/chat/completions": ChatCompletionRequest,
        "/v1/completions": CompletionRequest,
        "/v1/responses": ResponsesRequest,
    }
    found = {
        path: frozenset(kind.model_fields) | {field.alias for field in kind.model_fields.values() if field.alias}
        for path, kind in kinds.items()
    }
    if not calls_tools:
        found["/v1/responses"] -= {"tools"}
    return found


def server_arguments(
    path: str, name: str, adapters: Sequence[LocalAdapter], config: Any, tool_call_parser: str | None
) -> Namespace:
    """What vLLM's server is told besides the engine's arguments: its defaults, but for what is given here.

    Args:
        adapters: those that are loaded at run time; each is a model of its name.
        config: the engine's VllmConfig.
        tool_call_parser: a name of vLLM's; None: the model's calls of tools stay in the text.
    """
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    return Namespace(**{
        **vars(FrontendArgs()),
        "model": path,
        "served_model_name": [name],
        "lora_modules": [LoRAModulePath(name=each.name, path=str(each.folder)) for each in adapters],
        "structured_outputs_config": config.structured_outputs_config,
        "tool_call_parser": tool_call_parser,
        "enable_auto_tool_choice": tool_call_parser is not None,
        "disable_fastapi_docs": True,
        "enable_log_requests": False,
        "disable_log_stats": True,
    })  # fmt: skip
