"""A FAISS index over vectors: built and searched in batches, on the GPU if FAISS and the task have one.

Scores are FAISS's own: for `ip` the inner product (the cosine of unit vectors), for `l2` the squared distance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import faiss
import msgspec
import numpy as np

from flowmesh.messages.job import Fault
from runners.api import BadRequest, Context, RunnerError
from runners.rag.task import Faiss
from runners.rag.waiting import patiently

Metric = Literal["ip", "l2"]
IndexType = Literal["flat", "ivf", "hnsw"]
T = TypeVar("T")

ADD_ROWS = {"flat": 1 << 24, "ivf": 1 << 18, "hnsw": 1 << 16}
"""Rows between two progress reports. A flat index only copies; in pieces it would copy twice."""
QUERY_ROWS = 4096
COMPARED_AT_ONCE = 1 << 29
"""Upper bound of queries × vectors in one call."""
POINTS_A_CELL = 39
"""Fewer training points, and FAISS warns that the cells of an ivf index are not well trained."""
PROBED_SHARE = 8
MORE_EFFORT = 4
"""Factor of nprobe or efSearch if a search found too few rows."""
HNSW_LINKS = 32
HNSW_EF_CONSTRUCTION = 200
HNSW_EF_SEARCH = 64
GPU_MAX_K = 2048
"""Upper bound of results and of probed cells in FAISS's GPU search."""
SHORT_WORK = 1 << 29
"""Multiplications, or bytes copied, that take about 10 ms: not worth a thread."""


class GpuIndexOutOfMemory(RunnerError):
    """The index, or a search in it, does not fit the GPU's memory."""

    fault = Fault.GPU_OOM


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of an index with every default filled in; stored beside it."""

    metric: Metric
    index_type: IndexType
    normalize: bool
    dimension: int
    nlist: int | None = None
    m: int | None = None
    ef_construction: int | None = None


class Index:
    """A searchable index with its `recipe`."""

    def __init__(self, index: Any, recipe: Recipe, *, on_gpu: bool = False) -> None:
        self._index = index
        self.recipe = recipe
        self.on_gpu = on_gpu
        self.effort: dict[str, int] = {}
        """`nprobe` (ivf) or `ef_search` (hnsw) of the last search."""

    @property
    def count(self) -> int:
        return int(self._index.ntotal)

    def on_cpu(self) -> Any:
        """FAISS's own CPU object, which can be written to a file."""
        return faiss.index_gpu_to_cpu(self._index) if self.on_gpu else self._index

    def vector(self, row: int) -> np.ndarray:
        """The stored vector of a row."""
        index = self.on_cpu()
        if self.recipe.index_type == "ivf":
            index.make_direct_map()
        vector: np.ndarray = index.reconstruct(row)
        return vector

    def search(
        self, ctx: Context, vectors: np.ndarray, top_k: int, *, nprobe: int | None, ef_search: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and row numbers of each query's best rows, best first; -1 where fewer than `top_k` were found.

        Queries with fewer hits are searched again with a higher nprobe (ivf) or efSearch (hnsw), up to its maximum.

        Raises:
            BadRequest: the vectors are of another dimension than the index.
            Cancelled: the node asked the task to stop.
        """
        check_dimension(vectors.shape[1], self.recipe.dimension)
        top_k = min(top_k, self.count)
        vectors = prepared(vectors, self.recipe.normalize)
        self.effort = self._first_effort(top_k, nprobe, ef_search)
        scores, rows = self._search(ctx, vectors, top_k)
        while (short := np.flatnonzero((rows < 0).any(axis=1))).size and self._more_effort():
            scores[short], rows[short] = self._search(ctx, vectors[short], top_k)
        return scores, rows

    def _search(self, ctx: Context, vectors: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        index = self._index
        if self.on_gpu and max(top_k, self.effort.get("nprobe", 0)) > GPU_MAX_K:
            index = self.on_cpu()
        if self.recipe.index_type == "ivf":
            index.nprobe = self.effort["nprobe"]
        elif self.recipe.index_type == "hnsw":
            index.hnsw.efSearch = self.effort["ef_search"]
        scores = np.empty((len(vectors), top_k), dtype=np.float32)
        rows = np.empty((len(vectors), top_k), dtype=np.int64)
        step = max(min(QUERY_ROWS, COMPARED_AT_ONCE // max(self.count, 1)), 32)
        for first in range(0, len(vectors), step):
            ctx.progress(first, len(vectors), "queries")
            part = slice(first, first + step)
            work = len(vectors[part]) * self.count * self.recipe.dimension
            scores[part], rows[part] = computing(ctx, functools.partial(index.search, vectors[part], top_k), work)
        return scores, rows

    def _first_effort(self, top_k: int, nprobe: int | None, ef_search: int | None) -> dict[str, int]:
        if self.recipe.index_type == "ivf":
            cells = int(self._index.nlist)
            return {"nprobe": min(nprobe or min(max(cells // PROBED_SHARE, 1), GPU_MAX_K), cells)}
        if self.recipe.index_type == "hnsw":
            return {"ef_search": max(ef_search or HNSW_EF_SEARCH, top_k)}
        return {}

    def _more_effort(self) -> bool:
        """Raise nprobe or efSearch; False if it is at its maximum."""
        for name, now in self.effort.items():
            highest = int(self._index.nlist) if name == "nprobe" else self.count
            if now < highest:
                self.effort = {name: min(now * MORE_EFFORT, highest)}
                return True
        return False


def build(ctx: Context, vectors: np.ndarray, wanted: Faiss) -> Index:
    """An index over `vectors`, whose row numbers are theirs.

    Raises:
        BadRequest: more cells than vectors.
        Cancelled: the node asked the task to stop.
    """
    count, dimension = vectors.shape
    recipe = _recipe(wanted, count, dimension)
    index = _empty(recipe)
    on_gpu = gpu_usable(ctx) and recipe.index_type != "hnsw"  # FAISS has no HNSW for GPUs
    if on_gpu:
        index = to_gpu(index)
    vectors = prepared(vectors, recipe.normalize)
    if not index.is_trained:
        computing(ctx, lambda: index.train(vectors))
    step = ADD_ROWS[recipe.index_type]
    for first in range(0, count, step):
        ctx.progress(first, count, "vectors")
        part = vectors[first : first + step]
        computing(ctx, functools.partial(index.add, part), part.nbytes if recipe.index_type == "flat" else None)
    return Index(index, recipe, on_gpu=on_gpu)


def loaded(ctx: Context, index: Any, recipe: Recipe) -> Index:
    """An index that was read from a file, moved to the GPU if there is one."""
    on_gpu = gpu_usable(ctx) and recipe.index_type != "hnsw"
    if on_gpu:
        index = computing(ctx, functools.partial(to_gpu, index))
    return Index(index, recipe, on_gpu=on_gpu)


def check_dimension(found: int, wanted: int, what: str = "the index") -> None:
    """Raises BadRequest if the dimensions of the model and of `what` differ."""
    if found != wanted:
        raise BadRequest(
            f"spec.embedding.model: its vectors have {found} dimensions, those of {what} have {wanted}; "
            "use the model that it was built with"
        )


def prepared(vectors: np.ndarray, normalize: bool) -> np.ndarray:
    """Contiguous float32 rows, optionally normalized; a row of zeros stays."""
    rows = np.array(vectors, dtype=np.float32, order="C", copy=normalize)
    if normalize:
        faiss.normalize_L2(rows)
    return rows


def computing(ctx: Context, call: Callable[[], T], work: int | None = None) -> T:
    """The result of a FAISS call. A cancel does not wait for a long one.

    Long calls run on a separate thread, and OpenMP's number of threads is a setting of each thread.

    Args:
        work: its size in units of SHORT_WORK; None: unknown.

    Raises:
        GpuIndexOutOfMemory: the index does not fit the GPU's memory.
        Cancelled: the node asked the task to stop.
    """

    def run() -> T:
        faiss.omp_set_num_threads(max(ctx.threads, 1))
        return call()

    try:
        if work is not None and work <= SHORT_WORK:
            return run()
        return patiently(ctx.check_cancelled, run)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise GpuIndexOutOfMemory(
            "spec.faiss: the index does not fit the GPU's memory; ask for no GPU (resources.hardware.gpu.count: 0), or "
            f"split the documents ({' '.join(str(error).split())[-200:]})"
        ) from None


def gpu_usable(ctx: Context) -> bool:
    """Whether FAISS was built for GPUs and this task has one."""
    return bool(ctx.gpus) and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def to_gpu(index: Any) -> Any:
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def _recipe(wanted: Faiss, count: int, dimension: int) -> Recipe:
    kind = wanted.index_type or "flat"
    nlist = None
    if kind == "ivf":
        if wanted.nlist is not None and wanted.nlist > count:
            raise BadRequest(f"spec.faiss.nlist: {wanted.nlist} cells for {count} passages; give at most {count}")
        nlist = wanted.nlist or max(min(int(4 * math.sqrt(count)), count // POINTS_A_CELL), 1)
    return Recipe(
        metric=wanted.metric or "ip",
        index_type=kind,
        normalize=True if wanted.normalize is None else wanted.normalize,
        dimension=dimension,
        nlist=nlist,
        m=(wanted.m or HNSW_LINKS) if kind == "hnsw" else None,
        ef_construction=(wanted.ef_construction or HNSW_EF_CONSTRUCTION) if kind == "hnsw" else None,
    )


def _empty(recipe: Recipe) -> Any:
    metric = faiss.METRIC_INNER_PRODUCT if recipe.metric == "ip" else faiss.METRIC_L2
    match recipe.index_type:
        case "flat":
            return faiss.IndexFlat(recipe.dimension, metric)
        case "ivf":
            quantizer = faiss.IndexFlat(recipe.dimension, metric)
            index = faiss.IndexIVFFlat(quantizer, recipe.dimension, recipe.nlist, metric)
            index.cp.min_points_per_centroid = 1  # no warning about few passages in the task's log
            return index
        case "hnsw":
            index = faiss.IndexHNSWFlat(recipe.dimension, recipe.m, metric)
            index.hnsw.efConstruction = recipe.ef_construction
            return index
