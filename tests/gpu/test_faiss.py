"""An index on the GPU finds what it finds on the CPU. Needs faiss-gpu (the extra `rag-gpu`)."""

from __future__ import annotations

import json

import pytest

from tests.gpu.conftest import Script, line_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

COMPARE = """
import json, sys, tempfile
import faiss
import numpy as np
from flowmesh.messages.job import Job
from runners.api import Context
from runners.rag.faiss_index import build
from runners.rag.task import Faiss

if not hasattr(faiss, "StandardGpuResources"):
    print(json.dumps({"lacks": "faiss-gpu is not installed"}))
    sys.exit()
folder = tempfile.gettempdir()

def context(*gpus):
    job = Job(attempt=1, task_id="t", task_type="rag", runner="", task={"spec": {}}, out_dir=folder,
              results_dir=folder, cache_dir=folder, tmp_dir=folder, gpus=gpus, threads=4)
    return Context(job)

draw = np.random.default_rng(1)
vectors = draw.normal(size=(20_000, 64)).astype(np.float32)
queries = draw.normal(size=(200, 64)).astype(np.float32)
said = {"faiss_gpus": faiss.get_num_gpus()}
for kind in ("flat", "ivf", "hnsw"):
    found = []
    for ctx in (context("gpu"), context()):
        index = build(ctx, vectors, Faiss(index_type=kind))
        nprobe = index.recipe.nlist  # all cells: exact
        scores, rows = index.search(ctx, queries, 10, nprobe=nprobe, ef_search=400)
        found.append((index, scores, rows))
    (ours, our_scores, our_rows), (plain, scores, rows) = found
    hits = sum(len(set(a) & set(b)) for a, b in zip(our_rows.tolist(), rows.tolist()))
    said[kind] = {
        "on_gpu": ours.on_gpu,
        "plain_on_gpu": plain.on_gpu,
        "same": hits / rows.size,
        "scores_differ": float(np.abs(our_scores - scores).max()),
        "back_on_cpu": type(ours.on_cpu()).__name__ == type(plain.on_cpu()).__name__ and ours.on_cpu().ntotal == 20_000,
        "vector": float(np.abs(ours.vector(7) - plain.vector(7)).max()),
        "many": int((ours.search(context("gpu"), queries[:2], 3000, nprobe=nprobe, ef_search=None)[1] >= 0).sum()),
    }
print(json.dumps(said))
"""


def test_an_index_on_the_gpu_finds_what_it_finds_on_the_cpu(on_gpu: Script) -> None:
    said = json.loads(line_of(on_gpu(COMPARE)))
    if "lacks" in said:
        pytest.skip(said["lacks"])
    assert said["faiss_gpus"] >= 1
    for kind in ("flat", "ivf", "hnsw"):
        assert said[kind]["on_gpu"] is (kind != "hnsw"), "FAISS has no HNSW for GPUs"
        assert said[kind]["plain_on_gpu"] is False
        assert said[kind]["same"] > 0.99
        assert said[kind]["scores_differ"] < 1e-3
        assert said[kind]["back_on_cpu"]
        assert said[kind]["vector"] < 1e-5
    assert said["flat"]["many"] == 6000, "more than a GPU returns come from the CPU"
