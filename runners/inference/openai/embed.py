"""Answers the lines of a batch file that ask for embeddings, with sentence-transformers, or vLLM if the task says so.

Some thousand inputs are in memory at once, with their vectors. They are embedded in batches of similar length; a line
is written when the last of its inputs is embedded.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from runners.api import BadRequest, Context, MissingDependency
from runners.embedding.embedder import Embedder, Input, Vectors
from runners.embedding.load import embedding_source, load_source, model_digest, usable_device
from runners.embedding.options import Embedding, EmbeddingOptions
from runners.embedding.vllm_model import VllmEmbedder, load_vllm
from runners.inference.engine import Watch
from runners.inference.engines import note_unused
from runners.inference.openai.answers import refused, served
from runners.inference.openai.batch_rows import Answered, add_line
from runners.inference.openai.embedding_lines import AskedVectors, EmbeddingReader, answer, cut
from runners.inference.openai.file_lines import Lines
from runners.inference.openai.generate import task_defaults
from runners.inference.openai.lines import LineFault
from runners.inference.task import DTYPES, InferenceTask
from runners.inference.task_model import find_source
from runners.models.builtin import PREFIX
from runners.models.code import may_run_code
from runners.models.sources import Source, check_no_revision
from runners.rows.keys import key_of
from runners.rows.log import RowLog

OF_VLLM = ("dtype", "trust_remote_code", "max_model_len")
"""Engine arguments that an embedding model takes."""
WINDOW_INPUTS = 4096
WINDOW_BYTES = 256 * 2**20
"""Limits of what is in memory at once: of inputs, and of the bytes of their texts and vectors."""
LINE_NUMBERS = 2_500_000
"""Numbers in one line of output: at most 24 characters each, so that a row stays below `MAX_LINE_BYTES`."""


class Entry(msgspec.Struct):
    """A line that waits for its vectors."""

    index: int
    where: str
    asked: AskedVectors
    lengths: list[int]
    vectors: Vectors
    left: int
    """Inputs that are not embedded yet."""


class Embeddings:
    """The task's model as an embedding model. See `run.Kind`."""

    def __init__(self, ctx: Context, task: InferenceTask, names: Sequence[str]) -> None:
        """
        Args:
            names: that lines may give the model, besides its own.

        Raises:
            BadRequest: the document asks for what does not go with embeddings, or there is no such model.
            MissingDependency: sentence-transformers is not installed.
            RunnerError: the model hub cannot be reached.
        """
        check_options(ctx, task)
        library, extra = ("vllm", "vllm") if task.engine == "vllm" else ("sentence_transformers", "rag")
        if importlib.util.find_spec(library) is None:
            raise MissingDependency(library, "embeddings of a batch file", extra=extra)
        self._ctx = ctx
        self._task = task
        self.source = _source(ctx, task)
        kind = ("vllm", task.vllm.get("dtype")) if task.engine == "vllm" else (task.transformers.dtype,)
        identity = key_of("embedding", model_digest(self.source), *kind)
        self.reader = EmbeddingReader(tuple(dict.fromkeys((*names, self.source.shown))), identity)

    def answer(self, lines: Lines[AskedVectors], log: RowLog) -> Answered:
        """Answer the lines that have no row."""
        embedder = _load(self._ctx, self._task, self.source)
        batch = _Batch(self._ctx, embedder, lines, log)
        self._ctx.phase("embed")
        since = time.monotonic()
        batch.run()
        return Answered(time.monotonic() - since, {"embedding": embedder.describe()})


def check_options(ctx: Context, task: InferenceTask) -> None:
    """Raises BadRequest for what the document asks for, and embeddings do not have."""
    options = task.transformers
    if task.model.adapters:
        raise BadRequest("spec.model.adapters: not for embeddings; merge them into the model, and name the result")
    for name in ("load_in_8bit", "load_in_4bit"):
        if getattr(options, name):
            raise BadRequest(f"spec.model.transformers.{name}: not for embeddings; leave it out")
    for name in task.vllm if task.engine == "vllm" else ():
        if name not in OF_VLLM:
            raise BadRequest(
                f"spec.model.vllm.{name}: not for embeddings; leave it out ({', '.join(OF_VLLM)} are taken)"
            )
    ctx.unused += [f"spec.inference.{name} (embeddings)" for name in task_defaults(ctx)]
    note_unused(ctx, task, "vllm" if task.engine == "vllm" else "transformers")


def _source(ctx: Context, task: InferenceTask) -> Source:
    given, where = task.model.source, "spec.model.source.identifier"
    if task.checkpoint is None and given.identifier and not given.identifier.startswith(PREFIX):
        source = embedding_source(ctx, given.identifier, given.revision, where)
        if source.is_local:
            check_no_revision(given.revision, where)
        return source
    source = find_source(ctx, task)
    if source.tokenizer is not None:
        raise BadRequest(
            f"{source.where}: {source.shown!r} has no tokenizer; for embeddings save it beside the weights"
        )
    return source


def _load(ctx: Context, task: InferenceTask, source: Source) -> Embedder | VllmEmbedder:
    embedder = _load_vllm(ctx, task, source) if task.engine == "vllm" else _load_library(ctx, task, source)
    shown = " ".join(f"{name}={value}" for name, value in embedder.describe().items())
    ctx.log.info("embedding model loaded %s", shown)
    return embedder


def _load_vllm(ctx: Context, task: InferenceTask, source: Source) -> VllmEmbedder:
    trust = may_run_code(ctx, source, task.vllm.get("trust_remote_code"), "spec.model.vllm.trust_remote_code")
    dtype, longest = task.vllm.get("dtype"), task.vllm.get("max_model_len")
    if longest is not None and not (type(longest) is int and longest > 0):
        raise BadRequest(f"spec.model.vllm.max_model_len: expected an integer >= 1, found {longest!r:.60}")
    options = EmbeddingOptions(dtype=None if dtype == "auto" else dtype, max_seq_length=longest)
    return load_vllm(ctx, source, options, trust=trust, otherwise="transformers")


def _load_library(ctx: Context, task: InferenceTask, source: Source) -> Embedder:
    options = task.transformers
    wanted = {
        "dtype": DTYPES.get(options.dtype or "", options.dtype),
        "attn_implementation": options.attn_implementation,
    }
    on_cpu = task.enforce_cpu or options.device_map == "cpu"
    trust = may_run_code(ctx, source, options.trust_remote_code, "spec.model.transformers.trust_remote_code")
    return load_source(
        ctx, source, Embedding(), device="cpu" if on_cpu else usable_device(ctx), trust_remote_code=trust,
        model_options={name: value for name, value in wanted.items() if value is not None},
    )  # fmt: skip


class _Batch:
    """The lines of one task that have no answer yet."""

    def __init__(
        self, ctx: Context, embedder: Embedder | VllmEmbedder, lines: Lines[AskedVectors], log: RowLog
    ) -> None:
        self._ctx = ctx
        self._embedder = embedder
        self._lines = lines
        self._log = log
        self._watch = Watch(ctx, log.counts.total, log.counts.done)
        self._broken = ""

    def run(self) -> None:
        """Embed them."""
        for window in self._windows():
            self._embed(window)
        self._watch.step()

    def _windows(self) -> Iterator[list[Entry]]:
        window: list[Entry] = []
        inputs = held = 0
        for index, where, asked in self._lines.asked(frozenset(self._log.rows)):
            self._ctx.check_cancelled()
            try:
                entry = self._entry(index, where, asked)
            except LineFault as fault:
                self._refuse(index, where, asked, fault)
                continue
            window.append(entry)
            inputs += len(asked.inputs)
            held += asked.work[0] + entry.vectors.nbytes
            if inputs >= WINDOW_INPUTS or held >= WINDOW_BYTES:
                yield window
                window, inputs, held = [], 0, 0
        if window:
            yield window

    def _entry(self, index: int, where: str, asked: AskedVectors) -> Entry:
        """Raises LineFault for a line that the model cannot serve."""
        model, count = self._embedder, len(asked.inputs)
        self._check_dimensions(asked)
        wanted = asked.dimensions or model.dimension
        if count * wanted > LINE_NUMBERS:
            raise LineFault(
                f"body.input: {count} vectors of {wanted} numbers; a line of output takes {LINE_NUMBERS} numbers; "
                "split it", param="input",
            )  # fmt: skip
        lengths = [self._length(each, asked.field(number)) for number, each in enumerate(asked.inputs)]
        vectors = np.empty((count, wanted), dtype=np.float32)
        return Entry(index=index, where=where, asked=asked, lengths=lengths, vectors=vectors, left=count)

    def _check_dimensions(self, asked: AskedVectors) -> None:
        model, wanted = self._embedder, asked.dimensions
        if wanted is None or wanted == model.dimension:
            return
        if wanted > model.dimension:
            raise LineFault(
                f"body.dimensions: {wanted}; the model's vectors have {model.dimension}", param="dimensions"
            )
        if not model.matryoshka:
            raise LineFault(
                "body.dimensions: the model's configuration does not say that its vectors may be cut; leave it out, or "
                "set is_matryoshka in its config.json if it was trained for that",
                param="dimensions",
            )
        if model.cuts and wanted not in model.cuts:
            known = ", ".join(map(str, model.cuts))
            raise LineFault(f"body.dimensions: {wanted}; the model was trained for {known}", param="dimensions")

    def _length(self, given: Input, field: str) -> int:
        model = self._embedder
        try:
            if isinstance(given, str):
                tokens = model.count_as_embedded(given, model.default_prompt)
            elif model.takes_ids:
                model.check_ids(given, field)
                tokens = len(given)
            else:
                raise LineFault(f"{field}: the model takes texts only", param="input")
        except BadRequest as error:
            raise LineFault(str(error), param="input") from None
        if model.max_tokens is not None and tokens > model.max_tokens:
            raise LineFault(
                f"{field}: has {tokens} tokens; the model takes {model.max_tokens}; shorten it", param="input"
            )
        return tokens

    def _embed(self, window: list[Entry]) -> None:
        model = self._embedder
        for of_text in (True, False):
            flat = [
                (entry, number)
                for entry in window
                for number, each in enumerate(entry.asked.inputs)
                if isinstance(each, str) is of_text
            ]
            for batch in model.batches([entry.lengths[number] for entry, number in flat]):
                self._watch.step()
                places = [flat[each] for each in batch]
                rows = model.encode([entry.asked.inputs[number] for entry, number in places], model.default_prompt)
                for (entry, number), vector in zip(places, rows, strict=True):
                    entry.vectors[number] = cut(vector[None], entry.asked.dimensions, normalized=model.normalizes)[0]
                    entry.left -= 1
                    if not entry.left:
                        self._finish(entry)

    def _finish(self, entry: Entry) -> None:
        asked, tokens = entry.asked, sum(entry.lengths)
        if not np.isfinite(entry.vectors).all():
            self._broken = self._broken or self._embedder.not_finite()  # reads all weights
            self._refuse(entry.index, entry.where, asked, LineFault(self._broken, status=500))
            return
        body = answer(asked, entry.vectors, tokens)
        add_line(self._log, entry.index, served(asked.line.custom_id, body), prompt_tokens=tokens)
        entry.vectors = np.empty((0, 0), dtype=np.float32)  # the window lives on
        self._watch.done += 1
        self._watch.tokens += tokens

    def _refuse(self, index: int, where: str, asked: AskedVectors, fault: LineFault) -> None:
        fault.custom_id = asked.line.custom_id
        add_line(self._log, index, refused(fault, where), again=True)
        self._watch.done += 1
