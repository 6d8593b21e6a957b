"""Checks of an index that was read from a file, before it is searched. FAISS itself trusts most of what it reads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np

from runners.api import BadRequest, Context
from runners.rag.faiss_index import Recipe, computing

ROWS = 1 << 18
UNIT = 1e-2
"""Tolerance of a unit vector's length; rounding of float16 is within it."""
_CLASSES = {"flat": "IndexFlat", "ivf": "IndexIVFFlat", "hnsw": "IndexHNSWFlat"}
_METRICS = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}


def check_index(ctx: Context, index: Any, recipe: Recipe, where: str) -> None:
    """Check that an index matches its recipe, and that every vector in it can be compared.

    Args:
        where: the name of the file in errors.

    Raises:
        BadRequest: it is of another type or metric, not trained, inconsistent, or holds NaN or zeros.
        Cancelled: the node asked the task to stop.
    """
    if not isinstance(index, getattr(faiss, _CLASSES[recipe.index_type])):
        raise BadRequest(
            f"{where}: an {type(index).__name__}, where index.json says {recipe.index_type!r}, which is an "
            f"{_CLASSES[recipe.index_type]}; build it again with faiss.save"
        )
    if index.metric_type != _METRICS[recipe.metric]:
        found = next((name for name, metric in _METRICS.items() if metric == index.metric_type), index.metric_type)
        raise BadRequest(f"{where}: its metric is {found!r}, where index.json says {recipe.metric!r}")
    if not index.is_trained:
        raise BadRequest(f"{where}: the {recipe.index_type} index was never trained; build it again with faiss.save")
    if recipe.index_type == "ivf":
        _check_cells(index, recipe, where)
    for first, vectors in _vectors(ctx, index):
        _check_vectors(vectors, first, recipe, where)
    if isinstance(index, faiss.IndexIVF):
        index.set_direct_map_type(faiss.DirectMap.NoMap)  # free what row access needed


def _check_cells(index: Any, recipe: Recipe, where: str) -> None:
    """Every row is in exactly one cell."""
    cells = index.invlists
    if index.nlist != recipe.nlist or index.quantizer.ntotal != index.nlist or index.quantizer.d != index.d:
        raise BadRequest(f"{where}: {index.quantizer.ntotal} cells, where index.json says {recipe.nlist}")
    rows = [faiss.rev_swig_ptr(cells.get_ids(i), cells.list_size(i)).copy() for i in range(index.nlist)]
    if not np.array_equal(np.sort(np.concatenate(rows)), np.arange(index.ntotal)):
        raise BadRequest(f"{where}: its cells do not hold every row from 0 to {index.ntotal - 1} once; it is damaged")


def _vectors(ctx: Context, index: Any) -> Iterator[tuple[int, np.ndarray]]:
    if isinstance(index, faiss.IndexIVF):
        index.make_direct_map()
    for first in range(0, index.ntotal, ROWS):
        ctx.progress(first, index.ntotal, "vectors")
        count = min(ROWS, index.ntotal - first)
        yield first, computing(ctx, functools.partial(index.reconstruct_n, first, count), count * index.d)


def _check_vectors(vectors: np.ndarray, first: int, recipe: Recipe, where: str) -> None:
    norms = np.linalg.norm(vectors, axis=1)
    for wrong, what in (
        (~np.isfinite(norms), "NaN or infinite numbers"),
        (norms == 0, "nothing but zeros"),
        (abs(norms - 1) > UNIT if recipe.normalize else np.zeros(len(norms), bool), "a length that is not 1"),
    ):
        if (rows := np.flatnonzero(wrong)).size:
            raise BadRequest(
                f"{where}: vector {first + int(rows[0])} has {what}; build the index again with faiss.save"
            )
