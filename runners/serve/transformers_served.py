"""A served model in Transformers, in this process."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from runners.api import Context, RunnerError
from runners.inference.engines import note_unused
from runners.inference.loader import load as load_engine
from runners.inference.openai.answers import Answers
from runners.inference.openai.bodies import Defaults
from runners.inference.openai.model_defaults import ends_of_model, model_defaults
from runners.inference.task_model import find_source
from runners.inference.vision import Vision
from runners.inference.vllm_args import COMPILE_STEPS, Work
from runners.models.adapters import load_adapters, warn_other_base
from runners.rows.keys import key_of
from runners.serve.asked import AskReader
from runners.serve.calls import calls_tools, template_of
from runners.serve.errors import ServerLost
from runners.serve.gate import App, ServedModel
from runners.serve.generator import Generator
from runners.serve.replies import Replies
from runners.serve.task import ServeTask, check_names
from runners.serve.transformers_app import TransformersApp

WORK = Work(prompts=16, prompt_bytes=16 * 4096, new_tokens=COMPILE_STEPS, copies=1, images=1, images_of_one=1)
"""What a server is taken to do: a model that takes images is loaded as one."""


class TransformersServed:
    """See `served.Served`."""

    asks_usage = True
    fields: Mapping[str, Collection[str]] = MappingProxyType({})

    def __init__(self, app: App, models: tuple[ServedModel, ...], source: str, generator: Generator) -> None:
        self.app = app
        self.models = models
        self.source = source
        self._generator = generator

    def failure(self) -> RunnerError | None:
        return None if self._generator.alive else ServerLost("the thread that generates ended; see the task's log")

    def engine_numbers(self) -> dict[str, float]:
        return {"waiting": float(self._generator.waiting())}

    def close(self) -> None:
        self._generator.close()


def load(ctx: Context, task: ServeTask) -> TransformersServed:
    """Load the model with its adapters. Errors as for `served.load`."""
    note_unused(ctx, task.model, "transformers")
    source = find_source(ctx, task.model)
    adapters = load_adapters(ctx, task.model.model.adapters)
    for adapter in adapters:
        warn_other_base(ctx, adapter.where, adapter.base, source)
    runtime = [adapter for adapter in adapters if adapter.apply == "runtime"]
    check_names(runtime, task.name)
    defaults = Defaults(model=model_defaults(ctx, task.model, source))
    engine, texts = load_engine(ctx, task.model, source, adapters, work=WORK)
    names = [task.name, *(adapter.name for adapter in runtime)]
    template = template_of(texts.tokenizer, engine.model)
    reader = AskReader(
        ctx, names, names[1:], defaults, takes_images=isinstance(texts, Vision), calls_tools=calls_tools(template)
    )
    answers = Answers(texts, ends_of_model(source), None, f"flowmesh-transformers-{key_of(engine.describe())[:8]}")
    generator = Generator(ctx, engine, texts, adapters)
    app = TransformersApp(reader, Replies(texts, answers, template), generator)
    return TransformersServed(
        app, tuple(ServedModel(name=each, pinned=each) for each in names), source.shown, generator
    )
