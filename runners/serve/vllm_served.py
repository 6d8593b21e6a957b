"""A served model in vLLM: its engine in processes below this one, its application in this one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from flowmesh.messages.job import Fault
from flowmesh.validation.convert import nearest
from runners.api import BadRequest, Context, RunnerError
from runners.inference.engines import note_unused
from runners.inference.reasoning import check_allowed
from runners.inference.routing import ends_of
from runners.inference.task_model import find_source
from runners.inference.vllm_args import COMPILE_STEPS, WHERE, Work
from runners.inference.vllm_engine import set_environment
from runners.inference.vllm_failures import Logs, explain, first_line, start_failure, step_failure
from runners.inference.vllm_prepared import prepare
from runners.inference.vllm_processes import EngineProcesses
from runners.models.adapters import load_adapters
from runners.models.sources import Source
from runners.models.weights import not_finite
from runners.serve.errors import ServerLost
from runners.serve.gate import ServedModel
from runners.serve.task import ServeTask, check_names
from runners.serve.vllm_app import VllmApp, request_fields, server_arguments
from runners.serve.vllm_numbers import EngineNumbers

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
"""How vLLM makes its processes; `set_environment` has chosen."""
NO_DOMAIN = ("nowhere.invalid",)
"""The only host from which a request may have the engine fetch media: none. An empty list would mean all."""
WORK = Work(prompts=16, prompt_bytes=16 * 4096, new_tokens=COMPILE_STEPS, copies=1)
"""What a server is taken to do: enough for compiling to pay; on the CPU it bounds the key-value cache."""


class VllmServed:
    """See `served.Served`."""

    asks_usage = True

    def __init__(  # noqa: PLR0917
        self,
        engine: Any,
        app: VllmApp,
        models: tuple[ServedModel, ...],
        source: Source,
        numbers: EngineNumbers,
        fields: Mapping[str, Collection[str]],
    ) -> None:
        self.app = app
        self.models = models
        self.fields = fields
        self.source = source.shown
        self._engine = engine
        self._source = source
        self._numbers = numbers
        self._processes = EngineProcesses()
        self._logs = Logs()

    def failure(self) -> RunnerError | None:
        if self.app.error is not None:
            return _build_failure(self.app.error, self._source, self._logs)
        pid = self._processes.died()
        if pid is None and not self._engine.errored:
            return None
        if self._logs.cause() is None:
            process = "vLLM's engine" if pid is None else f"a process of vLLM's engine (pid {pid})"
            return ServerLost(f"{process} died; see the task's log")
        dtype = str(self._engine.model_config.dtype)
        found = step_failure(
            self._engine.dead_error, self._logs, not_finite(self._source.where, self._source.shown, dtype, None)
        )
        return found if found.fault is Fault.BAD_REQUEST else ServerLost(str(found))

    def engine_numbers(self) -> dict[str, float]:
        return self._numbers.read()

    def close(self) -> None:
        self._engine.shutdown(timeout=0)


def load(ctx: Context, task: ServeTask) -> VllmServed:
    """Start the engine. Errors as for `served.load`; the application is built by the HTTP server."""
    note_unused(ctx, task.model, "vllm")
    _check_parsers(ctx, task)
    source = find_source(ctx, task.model)
    adapters = load_adapters(ctx, task.model.model.adapters)
    check_names([adapter for adapter in adapters if adapter.apply == "runtime"], task.name)
    prepared = prepare(ctx, task.model, source, adapters, work=WORK)
    arguments = {"allowed_media_domains": list(NO_DOMAIN), **prepared.arguments}
    arguments |= {"served_model_name": [task.name], "disable_log_stats": True}
    set_environment(ctx, alone=prepared.alone, eager=bool(arguments["enforce_eager"]), apart=True)
    numbers = EngineNumbers()
    files = {"model": prepared.path, "tokenizer": source.tokenizer or source.path, "revision": prepared.revision}
    engine = start(files | arguments, source, numbers, asked=list(task.model.vllm))
    app = VllmApp(
        engine,
        server_arguments(prepared.path, task.name, prepared.runtime, engine.vllm_config, task.serve.tool_call_parser),
        checks_logits=prepared.checks_logits,
    )
    names = [None, *(adapter.name for adapter in prepared.runtime)]
    if prepared.runtime and engine.vllm_config.device_config.device_type == "cpu":
        names = names[1:]  # vLLM 0.32 answers a row without an adapter by another row's adapter there
    models = [
        ServedModel(name=name or task.name, pinned=name or task.name, ends=ends_of(adapters, name)) for name in names
    ]
    fields = request_fields(calls_tools=task.serve.tool_call_parser is not None)
    return VllmServed(engine, app, tuple(models), source, numbers, fields)


def start(arguments: dict[str, Any], source: Source, numbers: EngineNumbers, *, asked: Sequence[str]) -> Any:
    """Start vLLM's AsyncLLM, which belongs to the event loop that uses it first. Errors as for `vllm_engine.start`."""
    import pydantic
    from vllm import AsyncEngineArgs
    from vllm.config import CompilationConfig, StructuredOutputsConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    logs = Logs()
    try:
        given = dict(arguments)
        if isinstance(given.get("compilation_config"), int):
            given["compilation_config"] = CompilationConfig(mode=given["compilation_config"])
        if isinstance(given.get("structured_outputs_config"), dict):
            given["structured_outputs_config"] = StructuredOutputsConfig(**given["structured_outputs_config"])
        with _kept(METHOD):  # on the CPU vLLM sets it to spawn, which imports everything again
            config = AsyncEngineArgs(**given).create_engine_config()
        return AsyncLLM.from_vllm_config(
            config, stat_loggers=[lambda _config, _engine: numbers], disable_log_stats=True
        )
    except pydantic.ValidationError as error:
        raise BadRequest(explain(error.errors()[0], source, asked)) from error
    except Exception as error:
        raise start_failure(error, source, logs) from error


@contextlib.contextmanager
def _kept(name: str) -> Iterator[None]:
    """An environment variable as it is now, after the body too."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _build_failure(error: Exception, source: Source, logs: Logs) -> RunnerError:
    if isinstance(error, ValueError) and "lora" in str(error).lower():
        return BadRequest(
            f"spec.model.adapters: vLLM cannot apply an adapter at run time: {first_line(error)}; set apply: merge"
        )
    return start_failure(error, source, logs)


def _check_parsers(ctx: Context, task: ServeTask) -> None:
    """Raises BadRequest for a parser that vLLM does not have, or the operator does not allow."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    reasoning, tools = task.model.vllm.get("reasoning_parser"), task.serve.tool_call_parser
    for where, name, manager in (
        (f"{WHERE}.reasoning_parser", reasoning, ReasoningParserManager),
        ("spec.serve.tool_call_parser", tools, ToolParserManager),
    ):
        known = list(manager.list_registered())
        if name is not None and name not in known:
            raise BadRequest(f"{where}: vLLM has no parser {str(name)[:80]!r}; {nearest(str(name), known)}")
    check_allowed(ctx, reasoning, f"{WHERE}.reasoning_parser")
