"""An embedding task's sections as frozen structs, and the checks that need more than one field.

Field names are the document's own (docs/tasks.md, "embedding"). Null means "as if it were not there".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runners.api import BadRequest, Context
from runners.data.sources import check_data
from runners.embedding.options import EmbeddingOptions
from runners.fields import Faults, check_spec
from runners.inference.export import check_path
from runners.models.spec import Checkpoint, CheckpointLoad, ModelSource, Section
from runners.rag.task import Qdrant, check_qdrant
from runners.rows.resume import check_resume

OWN_FIELDS = (
    "data", "embedding", "model", "checkpoint", "engine", "enforce_cpu", "vectors", "faiss", "qdrant", "resume",
)  # fmt: skip
CALIBRATED = ("int8", "uint8")
"""Precisions whose steps are those of all vectors of the task."""

Engine = Literal["auto", "sentence_transformers", "vllm"]
Format = Literal["npy", "parquet", "jsonl"]
Count = Annotated[int, Meta(ge=1)]


class Vectors(Section, frozen=True):
    """spec.vectors: the file"""

    format: Format | None = None
    path: str | None = None
    """Below the task's folder; default: artifacts/vectors.<format>."""
    text: bool | None = None
    """parquet and jsonl: the texts beside their vectors."""


class Index(Section, frozen=True):
    """spec.faiss"""

    metric: Literal["ip", "l2"] | None = None
    index_type: Literal["flat", "ivf", "hnsw"] | None = None
    normalize: bool | None = None
    """Unit vectors, so that `ip` is the cosine. Default: true."""
    nlist: Count | None = None
    m: Annotated[int, Meta(ge=2, le=256)] | None = None
    ef_construction: Count | None = None


class Collection(Qdrant, frozen=True):
    """spec.qdrant: that of `rag`, and"""

    distance: Literal["cosine", "dot", "euclid"] | None = None
    """Of a collection that is not there yet."""


class ModelSection(Section, frozen=True):
    """spec.model"""

    source: ModelSource = ModelSource()


class EmbeddingTask(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document except its items."""

    options: EmbeddingOptions
    model: ModelSource
    checkpoint: CheckpointLoad | None
    engine: Engine
    on_cpu: bool
    vectors: Vectors | None
    """None: no file, only a store."""
    faiss: Index | None
    qdrant: Collection | None


def read_embedding(ctx: Context, spec: dict[str, Any], where: str = "spec", *, with_key: bool = True) -> EmbeddingTask:
    """The sections of `spec`, checked.

    Args:
        with_key: take the key of `qdrant.api_key_env` from the environment; False: only check the fields.

    Raises:
        BadRequest: naming all fields that are wrong.
    """
    faults = Faults()

    def section(name: str, into: type[Any]) -> Any:
        return faults.read(lambda: ctx.check(spec.get(name) or {}, into, f"{where}.{name}"))

    faults.read(lambda: check_spec(ctx, spec, where, OWN_FIELDS, {"embedding": EmbeddingOptions, "vectors": Vectors}))
    options, vectors = section("embedding", EmbeddingOptions), section("vectors", Vectors)
    faiss = section("faiss", Index) if spec.get("faiss") is not None else None
    qdrant: Any = section("qdrant", Collection) if spec.get("qdrant") is not None else None
    model, checkpoint = section("model", ModelSection), section("checkpoint", Checkpoint)
    chosen = faults.read(
        lambda: ctx.check({k: spec[k] for k in _Choice.__struct_fields__ if k in spec}, _Choice, where)
    )
    faults.read(lambda: check_data(ctx, spec, where))
    faults.read(lambda: check_resume(ctx, spec, where))
    if options is not None:
        faults.read(lambda: _check_options(options, spec, where))
    if vectors is not None:
        faults.read(lambda: _check_vectors(vectors, f"{where}.vectors"))
    if faiss is not None:
        faults.read(lambda: _check_index(faiss, options, where))
    if qdrant is not None:
        qdrant = faults.read(lambda: _with_key(qdrant, f"{where}.qdrant", take=with_key))
    if model is not None and checkpoint is not None and options is not None:
        faults.read(lambda: check_one_model(options.model, model.source, checkpoint.load, f"{where}.embedding", where))
    faults.check()
    assert chosen is not None, "else it was a fault"
    return EmbeddingTask(
        options=options,
        model=model.source,
        checkpoint=checkpoint.load,
        engine=chosen.engine or "auto",
        on_cpu=bool(chosen.enforce_cpu),
        vectors=vectors if spec.get("vectors") is not None or (faiss is None and qdrant is None) else None,
        faiss=faiss,
        qdrant=qdrant,
    )


def check_one_model(
    named: str | None, source: ModelSource, checkpoint: CheckpointLoad | None, section: str, where: str
) -> None:
    """Raises BadRequest where the document names more than one model."""
    given = {
        f"{section}.model": named, f"{where}.model.source.identifier": source.identifier,
        f"{where}.checkpoint.load": checkpoint,
    }  # fmt: skip
    found = [name for name, value in given.items() if value is not None]
    if len(found) > 1:
        raise BadRequest(f"{found[0]}: {found[1]} is there, too; give one of them")


class _Choice(Section, frozen=True):
    engine: Engine | None = None
    enforce_cpu: bool | None = None


def _check_options(options: EmbeddingOptions, spec: dict[str, Any], where: str) -> None:
    here = f"{where}.embedding"
    if options.prompt is not None and options.prompt_name is not None:
        raise BadRequest(f"{here}.prompt_name: {here}.prompt is there, too; give one of them")
    if options.precision in CALIBRATED and spec.get("shard") is not None:
        raise BadRequest(
            f"{here}.precision: the steps of {options.precision!r} come from all vectors of a task, so shards would "
            "differ; use float32 and convert the whole, or binary"
        )
    if spec.get("engine") == "vllm":
        if spec.get("enforce_cpu"):
            raise BadRequest(f"{where}.engine: 'vllm' and enforce_cpu exclude each other; leave one out")
        if options.device not in (None, "auto"):
            raise BadRequest(f"{here}.device: vLLM takes the task's GPU, or the CPU of a build for it; leave it out")
    if options.device == "cuda" and spec.get("enforce_cpu"):
        raise BadRequest(f"{here}.device: 'cuda', but {where}.enforce_cpu is set; leave one out")


def _check_vectors(vectors: Vectors, where: str) -> None:
    if vectors.path is not None:
        check_path(vectors.path, f"{where}.path", "vectors.npy")
    if vectors.text and (vectors.format or "npy") == "npy":
        raise BadRequest(f"{where}.text: a .npy file has vectors only; choose format parquet or jsonl")


def _check_index(faiss: Index, options: EmbeddingOptions | None, where: str) -> None:
    kind = faiss.index_type or "flat"
    for name, owner in (("nlist", "ivf"), ("m", "hnsw"), ("ef_construction", "hnsw")):
        if getattr(faiss, name) is not None and kind != owner:
            raise BadRequest(f"{where}.faiss.{name}: means something to index_type {owner!r} only (found {kind!r})")
    for name in ("pooling", "truncate_dim"):
        if getattr(options, name, None) is not None:
            raise BadRequest(
                f"{where}.embedding.{name}: a rag task that loads the index embeds queries with the model as it is; "
                f"leave it out, or write {where}.vectors only"
            )


def _with_key(qdrant: Collection, where: str, *, take: bool) -> Collection:
    if qdrant.path is not None:
        raise BadRequest(f"{where}.path: a local folder is only read; give the `url` of a server")
    return check_qdrant(qdrant, where, take=take)
