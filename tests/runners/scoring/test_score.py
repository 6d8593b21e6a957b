"""The task type `score` with tiny real cross-encoders: scores and order are sentence-transformers' own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra 'rag'")
import numpy as np
import yaml
from sentence_transformers import CrossEncoder

from runners.api import BadRequest, Cancelled, MissingDependency
from runners.scoring.runner import ScoreRunner
from tests.kit.paths import ROOT
from tests.kit.tiny_encoders import WORDS, write_cross_encoder

QUERY = "rain falls on the hill"
DOCUMENTS = [" ".join(WORDS[i : i + 5]) for i in range(8)]
PAIRS = [[QUERY, each] for each in DOCUMENTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cross_encoder(tmp_path_factory.mktemp("cross") / "one")


@pytest.fixture(scope="module")
def library(folder: Path) -> Any:
    return CrossEncoder(str(folder), device="cpu")


@pytest.fixture
def scored(make_context, folder):
    def run(spec: dict[str, Any], **fields: Any) -> dict[str, Any]:
        whole = {"enforce_cpu": True, **spec, "score": {"model": str(folder), **spec.get("score", {})}}
        result = ScoreRunner().run(make_context(whole, task_type="score", **fields))
        json.dumps(result, allow_nan=False)
        return result

    return run


def test_pairs_have_the_librarys_scores_in_their_order(scored, library) -> None:
    result = scored({"pairs": [*PAIRS, PAIRS[0]], "score": {"batch_size": 3}})
    found = [item["score"] for item in result["items"]]
    np.testing.assert_allclose(found[:-1], library.predict(PAIRS, show_progress_bar=False), atol=1e-6)
    assert found[-1] == found[0]
    assert [item["index"] for item in result["items"]] == list(range(len(PAIRS) + 1))
    assert result["score"]["activation"] == "sigmoid"
    assert result["usage"]["num_requests"] == len(PAIRS) + 1


@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
def test_documents_are_ranked_as_the_library_ranks_them(activation, scored, library) -> None:
    import torch

    made = {"sigmoid": torch.nn.Sigmoid(), "identity": torch.nn.Identity()}[activation]
    documents = [*DOCUMENTS, DOCUMENTS[0]]
    result = scored({"query": QUERY, "documents": documents, "score": {"top_n": 4, "activation": activation}})
    theirs = library.rank(QUERY, documents, top_k=4, activation_fn=made, show_progress_bar=False)
    ours = result["items"][0]["results"]
    assert [each["index"] for each in ours] == [each["corpus_id"] for each in theirs]
    np.testing.assert_allclose([each["score"] for each in ours], [each["score"] for each in theirs], atol=1e-5)
    assert all(each["document"] == documents[each["index"]] for each in ours)


def test_equal_scores_stand_as_they_were_given(scored) -> None:
    result = scored({"query": QUERY, "documents": ["a cat"] * 3, "score": {"return_documents": False}})
    assert [each["index"] for each in result["items"][0]["results"]] == [0, 1, 2]
    assert "document" not in result["items"][0]["results"][0]


def test_rows_of_a_file_bring_their_documents(scored, library, tmp_path) -> None:
    rows = [{"q": QUERY, "docs": DOCUMENTS[:3], "id": 1}, {"q": "a cat reads", "docs": DOCUMENTS[3:5], "id": 2}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"type": "jsonl", "path": str(tmp_path / "rows.jsonl"), "column": "q", "metadata_columns": ["docs", "id"]}
    result = scored({"data": data, "score": {"documents_column": "docs"}})
    for item, row in zip(result["items"], rows, strict=True):
        theirs = library.rank(row["q"], row["docs"], show_progress_bar=False)
        assert [each["index"] for each in item["results"]] == [each["corpus_id"] for each in theirs]
        assert (item["query"], item["metadata"]) == (row["q"], {"id": row["id"]})
    whole = {"type": "list", "items": DOCUMENTS, "metadata": [{"n": n} for n in range(len(DOCUMENTS))]}
    ranked = scored({"query": QUERY, "data": whole}, task_id="whole")["items"][0]["results"]
    assert [each["metadata"]["n"] for each in ranked] == [each["index"] for each in ranked]
    with pytest.raises(BadRequest, match="'document' in its metadata is missing"):
        scored({"data": whole}, task_id="none")


def test_a_pair_that_is_cut_is_counted_and_named(scored) -> None:
    long = " ".join(WORDS * 3)
    result = scored({"pairs": [[QUERY, "a cat"], [QUERY, long]]})
    assert result["truncated"] == {"count": 1, "items": [1]}
    assert (result["items"][1]["tokens"], result["items"][1]["truncated"]) == (32, True)
    with pytest.raises(BadRequest, match=r"spec\.pairs\[1\]: a pair has \d+ tokens, and the model uses 32"):
        scored({"pairs": [[QUERY, "a cat"], [QUERY, long]], "score": {"truncate": False}}, task_id="strict")


def test_an_interrupted_task_scores_only_what_is_missing(scored, make_context, folder, monkeypatch) -> None:
    spec = {
        "query": QUERY,
        "documents": DOCUMENTS,
        "score": {"model": str(folder), "batch_size": 3},
        "enforce_cpu": True,
    }
    ctx = make_context(spec, task_type="score")
    report = ctx.progress

    def stop(done: float, *args: Any, **fields: Any) -> None:
        report(done, *args, **fields)
        if done >= 3:
            raise Cancelled

    monkeypatch.setattr(ctx, "progress", stop)
    with pytest.raises(Cancelled):
        ScoreRunner().run(ctx)
    assert ctx.rows.done == 3
    again = scored(spec, anew=False)
    assert again["rows"] == {"done": 8, "total": 8, "reused": 3, "reused_tokens": again["rows"]["reused_tokens"]}
    assert again["items"] == scored(spec, task_id="whole")["items"]


def test_merged_tasks_have_results_of_their_own(scored, folder) -> None:
    child = {"pairs": [[QUERY, "a cat"]], "score": {"model": str(folder)}, "enforce_cpu": True}
    other = {**child, "score": {"model": str(folder), "activation": "identity"}}
    children = [{"task_id": "c1", "spec": child}, {"task_id": "c2", "spec": other}]
    result = scored({"pairs": [[QUERY, "a cat"], ["the hill", "tides"]]}, children=children)
    assert result["children"]["c1"]["items"][0]["score"] == result["items"][0]["score"]
    assert "score.activation: differs" in result["children"]["c2"]["error"]


def test_a_model_that_cannot_score_is_refused(scored, tmp_path) -> None:
    body = write_cross_encoder(tmp_path / "body", head=False)
    with pytest.raises(BadRequest, match="classifier"):
        scored({"pairs": PAIRS[:1], "score": {"model": str(body)}})
    three = write_cross_encoder(tmp_path / "three", labels=3)
    result = scored({"pairs": PAIRS[:2], "score": {"model": str(three), "activation": "softmax"}})
    assert all(sum(item["score"]) == pytest.approx(1) and len(item["score"]) == 3 for item in result["items"])
    with pytest.raises(BadRequest, match="has 3 labels, so documents have no order"):
        scored({"query": QUERY, "documents": DOCUMENTS, "score": {"model": str(three)}})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"query": QUERY}, "give `pairs`, or `query` with"),
        ({"pairs": PAIRS, "query": QUERY}, "found query, pairs"),
        ({"pairs": [["one"]]}, "spec.pairs[0]"),
        ({"query": QUERY, "documents": []}, "spec.documents"),
        ({"pairs": PAIRS, "score": {"top_n": 1}}, "spec.score.top_n"),
        ({"pairs": PAIRS, "score": {"max_seq_length": 64}}, "spec.score.max_seq_length: 64"),
        ({"pairs": PAIRS, "score": {"topn": 1}}, "spec.score.topn: unknown field"),
        ({"query": QUERY, "data": {"type": "list", "items": ["a"]}, "shard": {"index": 0, "total": 2}}, "spec.shard"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_is_refused_by_name(spec, said, scored) -> None:
    with pytest.raises(BadRequest) as caught:
        scored(spec)
    assert said in str(caught.value)


def test_the_example_runs_as_it_is(make_context, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    spec = yaml.safe_load((ROOT / "conf/tasks/score.yaml").read_text())["spec"]
    result = ScoreRunner().run(make_context(spec, task_type="score"))
    assert len(result["items"][0]["results"]) == 2


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_vllm_that_is_not_there_is_named(scored) -> None:
    with pytest.raises(MissingDependency, match="vllm"):
        scored({"pairs": PAIRS, "engine": "vllm", "enforce_cpu": False})
    with pytest.raises(BadRequest, match=r"spec\.engine: 'vllm' and enforce_cpu exclude each other"):
        scored({"pairs": PAIRS, "engine": "vllm"}, task_id="cpu")


def test_softmax_over_one_label_is_refused(scored) -> None:
    with pytest.raises(
        BadRequest, match=r"^spec\.score\.activation: softmax is over several labels, and the model has"
    ):
        scored({"pairs": PAIRS, "score": {"activation": "softmax"}})
