"""The sections of each task type's document as types, for its JSON Schema. Loaded by name, as `checks` is."""

from __future__ import annotations

from typing import Annotated, Any, get_type_hints

from msgspec import Meta

from runners.data.shard import Shard
from runners.models.spec import Checkpoint


def echo(task_type: str) -> dict[str, Any]:  # noqa: ARG001 - one signature for all
    return {"delaySec": Annotated[float, Meta(ge=0, le=86400)]}


def command(task_type: str) -> dict[str, Any]:
    from runners.command.task import CommandSpec, PythonSpec

    return get_type_hints(CommandSpec if task_type == "command" else PythonSpec, include_extras=True)


def inference(task_type: str) -> dict[str, Any]:  # noqa: ARG001
    from runners.inference.export import Postprocess
    from runners.inference.options import InferenceOptions
    from runners.inference.task import SOURCES
    from runners.rows.resume import Resume

    return {
        **_model(),
        "data": SOURCES,
        "inference": InferenceOptions,
        "postprocess": Postprocess,
        "resume": bool | Resume,
        "shard": Shard,
    }


def serve(task_type: str) -> dict[str, Any]:  # noqa: ARG001
    from runners.serve.task import Serve

    return {**_model(), "serve": Serve}


def _model() -> dict[str, Any]:
    from runners.inference.options import EngineName
    from runners.inference.task import Model

    return {"model": Model, "checkpoint": Checkpoint, "engine": EngineName, "enforce_cpu": bool}


def training(task_type: str) -> dict[str, Any]:
    from runners.training import settings
    from runners.training.kinds import KINDS

    kind = KINDS[task_type]
    sections: dict[str, Any] = {
        "model": settings.Model,
        "data": kind.data,
        "training": kind.training,
        "checkpoint": Checkpoint,
        "shard": Shard,
    }
    if kind.lora != "never":
        sections["lora"] = settings.Lora
    if kind.rewarded:
        function = settings.RewardFunction
        sections["generation"] = settings.Generation
        sections["reward_model"] = settings.RewardModel
        sections["reward"] = str | function | list[str | function]  # type: ignore[valid-type]
    return sections


def rag(task_type: str) -> dict[str, Any]:  # noqa: ARG001
    from runners.data.sources import SECTIONS
    from runners.embedding.options import Embedding
    from runners.rag.task import Faiss, Generate, Qdrant, Search
    from runners.rows.resume import Resume

    return {
        **_model(),
        "query": str,
        "data": SECTIONS,
        "search": Search,
        "embedding": Embedding,
        "faiss": Faiss,
        "qdrant": Qdrant,
        "generate": Generate,
        "resume": bool | Resume,
        "shard": Shard,
    }


def embedding(task_type: str) -> dict[str, Any]:  # noqa: ARG001
    from runners.embedding.options import EmbeddingOptions
    from runners.vectors.task import Collection, Engine, Index, Vectors

    return {
        **_embedding_model(),
        "engine": Engine,
        "embedding": EmbeddingOptions,
        "vectors": Vectors,
        "faiss": Index,
        "qdrant": Collection,
    }


def score(task_type: str) -> dict[str, Any]:  # noqa: ARG001
    from runners.scoring.task import Engine, Inline, ScoreOptions

    hints = get_type_hints(Inline, include_extras=True)
    return {**_embedding_model(), **hints, "engine": Engine, "score": ScoreOptions}


def _embedding_model() -> dict[str, Any]:
    from runners.data.sources import SECTIONS
    from runners.rows.resume import Resume
    from runners.vectors.task import ModelSection

    return {
        "model": ModelSection,
        "checkpoint": Checkpoint,
        "enforce_cpu": bool,
        "data": SECTIONS,
        "resume": bool | Resume,
        "shard": Shard,
    }


def api(task_type: str) -> dict[str, Any]:  # noqa: ARG001
    from runners.data.sources import SECTIONS
    from runners.remote.task import Api
    from runners.rows.resume import Resume

    return {"data": SECTIONS, "api": Api, "resume": bool | Resume, "shard": Shard}


def agent(task_type: str) -> dict[str, Any]:  # noqa: ARG001
    from runners.agent.task import AgentSection, StaticData
    from runners.data.sources import SECTIONS
    from runners.rows.resume import Resume

    return {
        "task": str,
        "data": {**SECTIONS, "static": StaticData},
        "configName": str,
        "agent": AgentSection,
        "resume": bool | Resume,
        "shard": Shard,
    }


def agent_config() -> Any:
    """The type of a configuration in the agents folder."""
    from runners.agent.config import AgentConfig

    return AgentConfig
