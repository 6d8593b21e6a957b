"""The embedding runner: items in, vectors out to a file, a FAISS index or a Qdrant collection."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from typing import Any

import msgspec

from runners.api import BadRequest, Context, MissingDependency, Preparation, Runner, RunnerError
from runners.data.sources import files_ahead
from runners.embedding.load import device_of, load_source, model_digest
from runners.embedding.options import DEFAULT_MODEL
from runners.inference.merge import failed, folder_of, read_children
from runners.models.code import may_run_code
from runners.models.sources import Source
from runners.rows.keys import key_of
from runners.rows.log import report_rows
from runners.vectors.batch import Batch, Model, quantized
from runners.vectors.output import FIELD, write_vectors
from runners.vectors.part import Finished, Part, counts_of, open_log, read_part
from runners.vectors.source import find_source
from runners.vectors.stores import build_index, passages, store_points
from runners.vectors.task import EmbeddingTask, read_embedding

SECTION = "spec.embedding"
MOST_LISTED = 200
"""Items that a result names for each of its counts."""


class EmbeddingRunner(Runner):
    """Task type `embedding`."""

    def ahead(self, ctx: Context) -> list[Preparation]:
        task = read_embedding(ctx, ctx.spec)
        return [lambda: _source(ctx, task).folders, lambda: files_ahead(ctx, ctx.spec)]

    def run(self, ctx: Context) -> dict[str, Any]:
        ctx.phase("prepare")
        task = read_embedding(ctx, ctx.spec)
        for library, needed in (
            ("sentence_transformers", True),
            ("vllm", task.engine == "vllm"),
            ("faiss", task.faiss),
            ("qdrant_client", task.qdrant),
        ):
            if needed and importlib.util.find_spec(library) is None:
                raise MissingDependency(library, extra="vllm" if library == "vllm" else "rag")
        children = read_children(ctx)
        refused: dict[str, dict[str, Any]] = {}
        parts: dict[str | None, Part] = {None: read_part(ctx, task, ctx.spec, "spec", task_id=None, folder=ctx.out_dir)}
        places: dict[str | None, tuple[dict[str, Any], str]] = {None: (ctx.spec, "spec")}
        for child in children:
            try:
                own = read_embedding(ctx, child.spec, child.where)
                check_agreement(task, own, child.where)
                folder = folder_of(ctx, child.task_id)
                parts[child.task_id] = read_part(
                    ctx, own, child.spec, child.where, task_id=child.task_id, folder=folder
                )
                places[child.task_id] = child.spec, child.where
            except RunnerError as error:
                refused[child.task_id] = _refuse(ctx, child.task_id, error)
        for part in parts.values():
            if part.task.faiss is not None or part.task.qdrant is not None:
                passages(part)  # raises for equal ids before anything is computed
        ctx.phase("load")
        source = _source(ctx, task)
        digest = identity(task, source)
        with contextlib.ExitStack() as stack:
            finished: dict[str | None, Finished] = {}
            for task_id, part in parts.items():
                try:
                    log = stack.enter_context(open_log(ctx, part, digest, *places[task_id]))
                except BadRequest as error:
                    if task_id is None:
                        raise
                    refused[task_id] = _refuse(ctx, task_id, error)
                else:
                    finished[task_id] = Finished(part, log)
            stack.callback(report_rows, ctx, [each.log for each in finished.values()])
            about, latency_s = self._embed(ctx, task, source, list(finished.values()))
            ctx.phase("save")
            results = {task_id: self._result(ctx, each, source, about, latency_s) for task_id, each in finished.items()}
        result = results.pop(None)
        if children:
            result["children"] = {
                child.task_id: refused.get(child.task_id) or results[child.task_id] for child in children
            }
        return result

    @staticmethod
    def _embed(
        ctx: Context, task: EmbeddingTask, source: Source, parts: list[Finished]
    ) -> tuple[dict[str, Any], float]:
        """Compute the rows that are missing; returns what the result says of the model, and the seconds that took."""
        if all(each.log.counts.done == each.log.counts.total for each in parts):
            return {"model": source.shown, "dimension": parts[0].vectors.shape[1]}, 0.0
        embedder: Model = load(ctx, task, source)
        batch = Batch(ctx, embedder, task.options, parts)
        _warn(ctx, task, source, embedder)
        ctx.phase("embed")
        since = time.monotonic()
        batch.run()
        about = {
            **embedder.describe(),
            "dimension": task.options.truncate_dim or embedder.dimension,
            "normalized": batch.normalized,
            **({"prompt": batch.prompt} if batch.prompt else {}),
        }
        return about, time.monotonic() - since

    @staticmethod
    def _result(
        ctx: Context, done: Finished, source: Source, about: dict[str, Any], latency_s: float
    ) -> dict[str, Any]:
        part, counts = done.part, done.log.counts
        task, items, vectors = part.task, done.log.items(), done.vectors
        unusual = counts_of(items, MOST_LISTED)
        for mark, said in unusual.items():
            ctx.log.warning("items marked %s task=%s count=%d", mark, part.task_id or ctx.task_id, said["count"])
        shown = quantized(vectors, task.options)
        tokens = sum(row.prompt_tokens for row in done.log.rows.values())
        result: dict[str, Any] = {
            "ok": True,
            "model": source.shown,
            "embedding": about,
            "dimension": int(vectors.shape[1]),
            "precision": task.options.precision or "float32",
            "dtype": str(shown.dtype),
            "items": items,
            **unusual,
            **({"rows": msgspec.to_builtins(counts)} if counts.reused else {}),
        }
        if task.vectors is not None:
            result[FIELD] = write_vectors(ctx, part, task.vectors, shown)
        if task.faiss is not None:
            ctx.phase("index")
            result["faiss"] = build_index(ctx, part, task.faiss, vectors, source, about.get("max_tokens"))
        if task.qdrant is not None:
            ctx.phase("store")
            result["qdrant"] = store_points(ctx, part, task.qdrant, vectors)
        result["usage"] = {
            "prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens, "num_requests": len(items),
            "latency_sec": round(latency_s, 6),
        }  # fmt: skip
        return result


def check_agreement(parent: EmbeddingTask, child: EmbeddingTask, where: str) -> None:
    """Raises BadRequest, naming the section, if a child is embedded differently from its parent."""
    mine, theirs = (
        {
            **{f"embedding.{name}": getattr(each.options, name) for name in each.options.__struct_fields__},
            "model": each.model, "checkpoint": each.checkpoint, "engine": each.engine, "enforce_cpu": each.on_cpu,
        }
        for each in (child, parent)
    )  # fmt: skip
    for name, value in mine.items():
        if name != "embedding.precision" and value != theirs[name]:
            raise BadRequest(f"{where}.{name}: differs from the task that it is merged into; send it by itself")


def identity(task: EmbeddingTask, source: Source) -> str:
    """Digest of what a text's vector depends on; not its precision, which is made of the rows.

    Raises:
        BadRequest, RunnerError: as for `sources.loading`.
    """
    options = task.options
    names = ("prompt", "prompt_name", "normalize", "truncate_dim", "max_seq_length", "pooling", "dtype")
    return key_of(model_digest(source), {name: getattr(options, name) for name in names})


def _source(ctx: Context, task: EmbeddingTask) -> Source:
    options = task.options
    return find_source(
        ctx, options.model, options.revision, task.model, task.checkpoint, SECTION, default=DEFAULT_MODEL
    )


def load(ctx: Context, task: EmbeddingTask, source: Source) -> Model:
    """The model on the task's device.

    Raises:
        BadRequest, EmbeddingOutOfMemory, RunnerError: as for `load_source`.
    """
    options = task.options
    wanted = options.trust_remote_code
    if wanted is None:
        wanted = task.model.trust_remote_code
    trust = may_run_code(ctx, source, wanted, f"{SECTION}.trust_remote_code")
    if task.engine == "vllm":
        from runners.embedding.vllm_model import load_vllm

        return load_vllm(ctx, source, options, trust=trust)
    device = device_of(ctx, "cpu" if task.on_cpu else options.device, f"{SECTION}.device")
    more = {} if options.dtype is None else {"dtype": options.dtype}
    embedder = load_source(ctx, source, options, device=device, trust_remote_code=trust, model_options=more or None)
    shown = " ".join(f"{name}={value}" for name, value in embedder.describe().items())
    ctx.log.info("embedding model loaded %s", shown)
    return embedder


def _warn(ctx: Context, task: EmbeddingTask, source: Source, embedder: Model) -> None:
    options = task.options
    if options.truncate_dim is not None:
        if not embedder.matryoshka:
            ctx.log.warning(
                "%s.truncate_dim: the configuration of %r does not say that its vectors may be cut; if it was not "
                "trained for that, they say less", SECTION, source.shown,
            )  # fmt: skip
        elif embedder.cuts and options.truncate_dim not in embedder.cuts:
            ctx.log.warning(
                "%s.truncate_dim: the model was trained for %s", SECTION, ", ".join(map(str, embedder.cuts))
            )
        if embedder.normalizes and not options.normalize:
            ctx.log.warning("%s.truncate_dim: cut vectors are not of unit length; set normalize", SECTION)


def _refuse(ctx: Context, task_id: str, error: RunnerError) -> dict[str, Any]:
    ctx.log.error("child refused child=%s error=%s", task_id, error)
    return failed(error)
