"""A score task's sections as frozen structs, and its pairs.

Field names are the document's own (docs/tasks.md, "score"). Null means "as if it were not there".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runners.api import BadRequest, Context
from runners.data.prompts import check_text
from runners.data.sources import check_data, load_items
from runners.embedding.options import Dtype, ModelOptions
from runners.fields import Faults, check_spec
from runners.models.spec import Checkpoint, CheckpointLoad, ModelSource
from runners.rag.documents import text_of
from runners.rows.resume import check_resume
from runners.vectors.task import ModelSection, check_one_model

OWN_FIELDS = (
    "query", "documents", "pairs", "data", "score", "model", "checkpoint", "engine", "enforce_cpu", "resume",
)  # fmt: skip
DEFAULT_DOCUMENTS = "document"

Engine = Literal["auto", "sentence_transformers", "vllm"]
Text = Annotated[str, Meta(min_length=1)]


class ScoreOptions(ModelOptions, frozen=True):
    """spec.score"""

    prompt: str | None = None
    prompt_name: str | None = None
    batch_size: Annotated[int, Meta(ge=1)] | None = None
    max_seq_length: Annotated[int, Meta(ge=1)] | None = None
    """Tokens of a pair that the model uses."""
    truncate: bool | None = None
    """false: a longer pair is an error, and nothing is cut."""
    activation: Literal["sigmoid", "identity", "softmax"] | None = None
    """Default: the model's own."""
    dtype: Dtype | None = None
    documents_column: Text | None = None
    """Of `data`: the key in a row's metadata with its document or documents."""
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool | None = None


class Group(msgspec.Struct, frozen=True):
    """One query with its documents."""

    query: str
    documents: tuple[str, ...]
    where: str
    metadata: dict[str, Any] | None = None
    is_pair: bool = False
    """Its only document has a score, and no place among others."""
    of_documents: tuple[dict[str, Any] | None, ...] = ()
    """Metadata of each document, where they are rows of `data`."""


class ScoreTask(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document except its pairs."""

    options: ScoreOptions
    model: ModelSource
    checkpoint: CheckpointLoad | None
    engine: Engine
    on_cpu: bool


class _Choice(msgspec.Struct, frozen=True):
    engine: Engine | None = None
    enforce_cpu: bool | None = None


class Inline(msgspec.Struct, frozen=True):
    """Texts in the document itself."""

    query: Text | None = None
    documents: Annotated[tuple[Text, ...], Meta(min_length=1)] | None = None
    pairs: Annotated[tuple[tuple[Text, Text], ...], Meta(min_length=1)] | None = None


def read_score(ctx: Context, spec: dict[str, Any], where: str = "spec") -> ScoreTask:
    """The sections of `spec`, checked.

    Raises:
        BadRequest: naming all fields that are wrong.
    """
    faults = Faults()

    def section(name: str, into: type[Any]) -> Any:
        return faults.read(lambda: ctx.check(spec.get(name) or {}, into, f"{where}.{name}"))

    faults.read(lambda: check_spec(ctx, spec, where, OWN_FIELDS, {"score": ScoreOptions}))
    options, model, checkpoint = (
        section(name, into)
        for name, into in (("score", ScoreOptions), ("model", ModelSection), ("checkpoint", Checkpoint))
    )
    chosen = faults.read(lambda: ctx.check(_only(spec, _Choice), _Choice, where))
    faults.read(lambda: _check_inputs(ctx, spec, where, options or ScoreOptions()))
    faults.read(lambda: check_resume(ctx, spec, where))
    if spec.get("engine") == "vllm":
        faults.read(lambda: _check_vllm(spec, options, where))
    if model is not None and checkpoint is not None and options is not None:
        faults.read(lambda: _check_model(options, model.source, checkpoint.load, where))
    faults.check()
    assert chosen is not None, "else it was a fault"
    return ScoreTask(
        options=options, model=model.source, checkpoint=checkpoint.load, engine=chosen.engine or "auto",
        on_cpu=bool(chosen.enforce_cpu),
    )  # fmt: skip


def read_groups(ctx: Context, task: ScoreTask, spec: dict[str, Any], where: str = "spec") -> list[Group]:
    """The task's queries with their documents, in order.

    Raises:
        BadRequest: naming the field or the row.
    """
    given = ctx.check(_only(spec, Inline), Inline, where)
    check_text([given.query, given.documents, given.pairs], where)
    if given.pairs is not None:
        return [
            Group(query, (document,), f"{where}.pairs[{number}]", is_pair=True)
            for number, (query, document) in enumerate(given.pairs)
        ]
    if given.query is not None and given.documents is not None:
        return [Group(given.query, given.documents, f"{where}.query")]
    items = load_items(ctx, spec, where)
    texts = [text_of(prompt, place) for prompt, place in zip(items.prompts, items.wheres, strict=True)]
    if not texts:
        raise BadRequest(f"{where}.data: has no items")
    if given.query is not None:
        return [Group(given.query, tuple(texts), f"{where}.query", of_documents=items.metadata)]
    column = task.options.documents_column or DEFAULT_DOCUMENTS
    return [
        _of_row(text, metadata, place, column)
        for text, metadata, place in zip(texts, items.metadata, items.wheres, strict=True)
    ]


def _of_row(text: str, metadata: dict[str, Any] | None, where: str, column: str) -> Group:
    found = (metadata or {}).get(column)
    rest = {name: value for name, value in (metadata or {}).items() if name != column} or None
    if isinstance(found, str):
        return Group(text, (found,), where, rest, is_pair=True)
    if isinstance(found, list | tuple) and found and all(isinstance(each, str) for each in found):
        return Group(text, tuple(found), where, rest)
    shown = "is missing" if found is None else f"is {type(found).__name__}"
    raise BadRequest(
        f"{where}: {column!r} in its metadata {shown}; give a text or a list of texts (metadata_columns of a file, "
        "and spec.score.documents_column)"
    )


def _only(spec: dict[str, Any], into: type[msgspec.Struct]) -> dict[str, Any]:
    return {name: spec[name] for name in into.__struct_fields__ if name in spec}


def _check_inputs(ctx: Context, spec: dict[str, Any], where: str, options: ScoreOptions) -> None:
    ctx.check(_only(spec, Inline), Inline, where)
    given = tuple(name for name in ("query", "documents", "pairs", "data") if spec.get(name) is not None)
    if given not in (("query", "documents"), ("query", "data"), ("pairs",), ("data",)):
        found = ", ".join(given) or "none of them"
        raise BadRequest(
            f"{where}: give `pairs`, or `query` with `documents` or `data`, or `data` whose rows have both; "
            f"found {found}"
        )
    if "data" in given:
        check_data(ctx, spec, where)
    elif spec.get("shard") is not None:
        raise BadRequest(f"{where}.shard: only the rows of {where}.data can be sharded; leave it out")
    if given == ("query", "data") and spec.get("shard") is not None:
        raise BadRequest(f"{where}.shard: would rank each shard's documents by themselves; leave it out")
    if given != ("data",) and options.documents_column is not None:
        raise BadRequest(f"{where}.score.documents_column: goes with `data` without `query`; leave it out")
    if given == ("pairs",):
        for name in ("top_n", "return_documents"):
            if getattr(options, name) is not None:
                raise BadRequest(f"{where}.score.{name}: pairs have no order; leave it out")


def _check_vllm(spec: dict[str, Any], options: ScoreOptions | None, where: str) -> None:
    if spec.get("enforce_cpu"):
        raise BadRequest(f"{where}.engine: 'vllm' and enforce_cpu exclude each other; leave one out")
    if options is not None and options.device not in (None, "auto"):
        raise BadRequest(f"{where}.score.device: vLLM takes the task's GPU, or the CPU of a build for it; leave it out")


def _check_model(options: ScoreOptions, source: ModelSource, checkpoint: CheckpointLoad | None, where: str) -> None:
    here = f"{where}.score"
    check_one_model(options.model, source, checkpoint, here, where)
    if options.model is None and source.identifier is None and checkpoint is None:
        raise BadRequest(f"{here}.model: missing; give a cross-encoder, such as cross-encoder/ms-marco-MiniLM-L6-v2")
    if options.prompt is not None and options.prompt_name is not None:
        raise BadRequest(f"{here}.prompt_name: {here}.prompt is there, too; give one of them")
