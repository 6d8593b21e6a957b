"""A rag task's sections as frozen structs, and the checks that need more than one field.

Field names are the document's own (docs/tasks.md, "rag"). Null means "as if it were not there".
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from runners.api import BadRequest, Context
from runners.data.sources import check_data
from runners.embedding.options import Embedding
from runners.fields import Faults, check_spec
from runners.inference.options import InferenceOptions, sampling_of, system_prompt_of
from runners.inference.task import InferenceTask, read_task
from runners.models.spec import ArchiveFormat, Headers, Section
from runners.rows.resume import check_resume

OWN_FIELDS = (
    "query", "data", "search", "embedding", "qdrant", "faiss", "generate", "model", "checkpoint", "engine",
    "enforce_cpu", "resume",
)  # fmt: skip
MODEL_FIELDS = ("model", "checkpoint", "engine", "enforce_cpu")
DEFAULT_TOP_K = 5
DEFAULT_TEMPLATE = (
    "Answer the question from the passages below. Say so where they do not hold the answer.\n\n"
    "Passages:\n{context}\n\nQuestion: {query}\nAnswer:"
)
PLACEHOLDERS = re.compile(r"\{(context|query)\}")

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class Search(Section, frozen=True):
    """spec.search"""

    top_k: Annotated[int, Meta(ge=1, le=10_000)] | None = None


class Chunk(Section, frozen=True):
    """spec.faiss.chunk"""

    tokens: Annotated[int, Meta(ge=8)] | None = None
    """Maximum tokens of a passage; default: 256, or what the embedding model takes."""
    overlap: Annotated[int, Meta(ge=0)] | None = None
    """Tokens that a passage shares with the one before it; default: an eighth of `tokens`."""


class IndexSource(Section, frozen=True, rename={"task_id": "taskId", "timeout_s": "timeoutSec"}):
    """spec.faiss.index, written out"""

    path: str | None = None
    url: str | None = None
    task_id: str | None = None
    headers: Headers | None = None
    timeout_s: Seconds | None = None
    archive_format: ArchiveFormat | None = None


class Faiss(Section, frozen=True):
    """spec.faiss"""

    index: str | IndexSource | None = None
    documents: dict[str, Any] | None = None
    """A data source; its column is the text."""
    path: str | None = None
    """A document, a folder of documents, or the folder of an index."""
    metric: Literal["ip", "l2"] | None = None
    index_type: Literal["flat", "ivf", "hnsw"] | None = None
    save: bool | None = None
    normalize: bool | None = None
    """Unit vectors, so that `ip` is the cosine. Default: true."""
    chunk: Chunk | None = None
    nlist: Count | None = None
    """ivf: cells."""
    nprobe: Count | None = None
    """ivf: cells probed by each query; raised if they hold fewer than top_k passages."""
    m: Annotated[int, Meta(ge=2, le=256)] | None = None
    """hnsw: links of each node."""
    ef_construction: Count | None = None
    ef_search: Count | None = None

    @property
    def source(self) -> str:
        """The name of the field that gives the passages."""
        return next(name for name in ("index", "documents", "path") if getattr(self, name) is not None)


class Qdrant(Section, frozen=True, rename={"timeout_s": "timeoutSec"}):
    """spec.qdrant"""

    collection: Annotated[str, Meta(min_length=1)]
    url: str | None = None
    path: str | None = None
    """Ours: a folder of qdrant-client's local mode, in place of a server."""
    api_key: str | None = None
    api_key_env: str | None = None
    """Ours: the environment variable that holds the key, to keep it out of the document."""
    vector: str | None = None
    """Ours: the vector's name, if a collection has several."""
    timeout_s: Seconds | None = None

    def __repr__(self) -> str:
        return f"Qdrant(collection={self.collection!r})"


QdrantT = TypeVar("QdrantT", bound=Qdrant)


class Generate(InferenceOptions, frozen=True):
    """spec.generate: the fields of spec.inference, and"""

    template: Annotated[str, Meta(min_length=1)] | None = None
    """The prompt, with {context} and {query}."""


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """How answers are made from passages, with every default filled in."""

    template: str
    inference: InferenceTask
    """Its system prompt is not set: see `RagTask.system_prompt`."""


class RagTask(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document except its queries."""

    embedding: Embedding
    top_k: int
    faiss: Faiss | None
    qdrant: Qdrant | None
    generation: Generation | None
    system_prompt: str | None = None

    @property
    def builds_index(self) -> bool:
        """Whether the task may be without a query, as it saves an index."""
        return self.faiss is not None and bool(self.faiss.save) and self.generation is None


def read_rag(ctx: Context, spec: dict[str, Any], where: str = "spec", *, with_key: bool = True) -> RagTask:
    """The sections of `spec`, checked.

    Args:
        with_key: take the key of `qdrant.api_key_env` from the environment; False: only check the fields.

    Raises:
        BadRequest: naming all fields that are wrong.
    """
    faults = Faults()

    def section(name: str, into: type[Any]) -> Any:
        return faults.read(lambda: ctx.check(spec.get(name) or {}, into, f"{where}.{name}"))

    given = [name for name in ("faiss", "qdrant") if spec.get(name) is not None]
    generates = spec.get("generate") is not None
    own = OWN_FIELDS if generates else [name for name in OWN_FIELDS if name not in MODEL_FIELDS]
    faults.read(lambda: check_spec(ctx, spec, where, own, {"generate": Generate} if generates else {}))
    faiss = section("faiss", Faiss) if "faiss" in given else None
    qdrant = section("qdrant", Qdrant) if "qdrant" in given else None
    faults.read(lambda: _check_one_index(given, where))
    if faiss is not None:
        faults.read(lambda: _check_faiss(faiss, f"{where}.faiss"))
    if qdrant is not None:
        without_key: Qdrant = qdrant
        qdrant = faults.read(lambda: check_qdrant(without_key, f"{where}.qdrant", take=with_key))
    options = section("generate", Generate) if generates else None
    embedding, search = section("embedding", Embedding), section("search", Search)
    if isinstance(spec.get("data"), dict) and spec.get("query") is None:
        faults.read(lambda: check_data(ctx, spec, where))
    faults.read(lambda: check_resume(ctx, spec, where))
    generation = system_prompt = None
    if options is not None:
        generation = faults.read(lambda: _generation(ctx, spec, options, where))
        system_prompt = faults.read(lambda: system_prompt_of(options, f"{where}.generate"))
    faults.check()
    return RagTask(
        embedding=embedding,
        top_k=search.top_k or DEFAULT_TOP_K,
        faiss=faiss,
        qdrant=qdrant,
        generation=generation,
        system_prompt=system_prompt,
    )


def check_query(spec: dict[str, Any], where: str, *, builds_index: bool) -> bool:
    """Check that the task has one source of queries; returns whether it has any.

    Args:
        builds_index: the task may be without, as it only builds an index.

    Raises:
        BadRequest: naming the field.
    """
    query, data = spec.get("query"), spec.get("data")
    if query is not None and data is not None:
        raise BadRequest(f"{where}.query: {where}.data is there, too; give one of them")
    if query is not None:
        if spec.get("shard") is not None:
            raise BadRequest(f"{where}.shard: only the rows of {where}.data can be sharded; leave it out")
        if not isinstance(query, str) or not query.strip():
            raise BadRequest(f"{where}.query: expected a text (found {type(query).__name__} {query!r:.60})")
    elif data is None and not builds_index:
        raise BadRequest(
            f"{where}.query: missing; give a query or {where}.data (or faiss.save, to only build an index)"
        )
    return query is not None or data is not None


def _check_one_index(given: list[str], where: str) -> None:
    if len(given) != 1:
        found = "both are there" if given else "neither is there"
        raise BadRequest(f"{where}: give either `faiss` or `qdrant` ({found})")


def _check_faiss(faiss: Faiss, where: str) -> None:
    given = [name for name in ("index", "documents", "path") if getattr(faiss, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise BadRequest(f"{where}: give one of `index`, `documents` and `path` (found {found})")
    kind = faiss.index_type or "flat"
    if faiss.index is None:
        for name, owner in (("nlist", "ivf"), ("nprobe", "ivf"), ("m", "hnsw"), ("ef_construction", "hnsw"),
                            ("ef_search", "hnsw")):  # fmt: skip
            if getattr(faiss, name) is not None and kind != owner:
                raise BadRequest(f"{where}.{name}: means something to index_type {owner!r} only (found {kind!r})")
    else:
        for name in ("metric", "index_type", "normalize", "chunk", "nlist", "m", "ef_construction"):
            if getattr(faiss, name) is not None:
                raise BadRequest(f"{where}.{name}: was settled when {where}.index was built; leave it out")
        if faiss.save:
            raise BadRequest(f"{where}.save: the index of {where}.index is saved already; leave it out")
    chunk = faiss.chunk
    if chunk is not None and chunk.tokens is not None and (chunk.overlap or 0) > chunk.tokens // 2:
        raise BadRequest(
            f"{where}.chunk.overlap: {chunk.overlap} of {chunk.tokens} tokens; at most half of them can be shared"
        )


def check_qdrant(qdrant: QdrantT, where: str, *, take: bool) -> QdrantT:
    """The section with its key in `api_key`, also if the document gives `api_key_env`.

    Args:
        take: take the key from the environment; False: only check the fields.

    Raises:
        BadRequest: naming the field.
    """
    if (qdrant.url is None) == (qdrant.path is None):
        raise BadRequest(f"{where}: give either `url` (a server) or `path` (a local folder)")
    if qdrant.api_key_env is None:
        return qdrant
    if qdrant.api_key is not None:
        raise BadRequest(f"{where}.api_key_env: {where}.api_key is there, too; give one of them")
    if not take:
        return qdrant
    key = os.environ.get(qdrant.api_key_env)
    if not key:
        raise BadRequest(
            f"{where}.api_key_env: the variable {qdrant.api_key_env} is not set for this task; "
            "the node passes on what its tasks.pass_env names"
        )
    return msgspec.structs.replace(qdrant, api_key=key, api_key_env=None)


def _generation(ctx: Context, spec: dict[str, Any], options: Generate, where: str) -> Generation:
    template = options.template or DEFAULT_TEMPLATE
    missing = {"context", "query"} - {match[1] for match in PLACEHOLDERS.finditer(template)}
    if missing:
        names = " and ".join(f"{{{name}}}" for name in sorted(missing))
        raise BadRequest(f"{where}.generate.template: {names} must stand in it")
    wanted = {name: spec[name] for name in MODEL_FIELDS if spec.get(name) is not None}
    for name in ("engine", "enforce_cpu"):
        if (value := getattr(options, name)) is not None:
            if wanted.get(name, value) != value:
                raise BadRequest(f"{where}.generate.{name}: {value!r}, but {where}.{name} says {wanted[name]!r}")
            wanted[name] = value
    task = msgspec.structs.replace(
        read_task(ctx, wanted, where),
        sampling=sampling_of(options, f"{where}.generate"),
        chat=bool(options.chat),
        reasoning_parser=options.reasoning_parser,
        system_prompt=None,
    )
    return Generation(template=template, inference=task)


def note_embedded(ctx: Context, task: RagTask) -> None:
    """Warn of a prompt for documents that are embedded already."""
    if task.embedding.document_prompt is not None:
        ctx.log.warning(
            "spec.embedding.document_prompt: without effect, because the documents are embedded already; give it to "
            "the task that embeds them"
        )
