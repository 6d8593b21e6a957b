"""FAISS through the rag runner's index beside FAISS itself: the same vectors, settings and threads, in turns."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from typing import Any

from tests.bench.measure import Row, timed

DIMENSION = 384
TOP_K = 10
AIM = "within 10 %"
MOST_ROUNDS, ENOUGH_S = 100, 2.0


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    if importlib.util.find_spec("faiss") is None:
        return [Row("FAISS", "not measured: faiss is not installed")]
    rows: list[Row] = []
    for kind, count in (("flat", 100_000), ("ivf", 100_000), ("hnsw", 10_000)):
        rows += _of_kind(kind, count // 10 if quick else count, queries=200 if quick else 2000)
    return rows


def _of_kind(kind: str, count: int, *, queries: int) -> list[Row]:
    import faiss
    import numpy as np

    from flowmesh.messages.job import Job
    from runners.api import Context
    from runners.rag import faiss_index
    from runners.rag.task import Faiss

    folder = tempfile.gettempdir()
    threads = os.cpu_count() or 1
    job = Job(attempt=1, task_id="t", task_type="rag", runner="", task={"spec": {}}, out_dir=folder, results_dir=folder,
              cache_dir=folder, tmp_dir=folder, threads=threads)  # fmt: skip
    ctx = Context(job)
    draw = np.random.default_rng(1)
    vectors = draw.normal(size=(count, DIMENSION)).astype(np.float32)
    asked = draw.normal(size=(queries, DIMENSION)).astype(np.float32)
    wanted = Faiss(index_type=kind)
    faiss.omp_set_num_threads(threads)

    def bare_build() -> Any:
        rows = vectors.copy()
        faiss.normalize_L2(rows)
        recipe = ours.recipe
        if kind == "flat":
            index = faiss.IndexFlatIP(DIMENSION)
        elif kind == "ivf":
            quantizer = faiss.IndexFlatIP(DIMENSION)
            index = faiss.IndexIVFFlat(quantizer, DIMENSION, recipe.nlist, faiss.METRIC_INNER_PRODUCT)
            index.train(rows)
        else:
            index = faiss.IndexHNSWFlat(DIMENSION, recipe.m, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = recipe.ef_construction
        index.add(rows)
        return index

    def bare_search() -> Any:
        rows = asked.copy()
        faiss.normalize_L2(rows)
        if kind == "ivf":
            bare.nprobe = max(bare.nlist // faiss_index.PROBED_SHARE, 1)
        elif kind == "hnsw":
            bare.hnsw.efSearch = faiss_index.HNSW_EF_SEARCH
        return bare.search(rows, TOP_K)

    ours = faiss_index.build(ctx, vectors, wanted)
    bare = bare_build()
    build_s = _in_turns(lambda: faiss_index.build(ctx, vectors, wanted), bare_build)
    search_s = _in_turns(lambda: ours.search(ctx, asked, TOP_K, nprobe=None, ef_search=None), bare_search)
    return [
        Row(
            f"FAISS {kind}, {count} × {DIMENSION}: building the index",
            f"{build_s[0]:.3f} s",
            f"bare FAISS {build_s[1]:.3f} s ({build_s[0] / build_s[1] - 1:+.1%})",
            AIM,
            build_s[0] / build_s[1],
        ),
        Row(
            f"FAISS {kind}, {count} × {DIMENSION}: queries, top {TOP_K}",
            f"{queries / search_s[0]:.0f}/s",
            f"bare FAISS {queries / search_s[1]:.0f}/s ({search_s[0] / search_s[1] - 1:+.1%} time)",
            AIM,
            search_s[0] / search_s[1],
        ),
    ]


def _in_turns(one: Callable[[], Any], other: Callable[[], Any], rounds: int = 6) -> tuple[float, float]:
    """The least seconds of each, measured in turns: what a busy machine adds is neither's. Short ones get more."""
    taken: dict[Callable[[], Any], list[float]] = {one: [], other: []}
    number = 0
    while number < rounds or (number < MOST_ROUNDS and sum(map(sum, taken.values())) < ENOUGH_S):
        number += 1
        for call in (one, other) if number % 2 else (other, one):
            taken[call].append(timed(call))
    return min(taken[one]), min(taken[other])
