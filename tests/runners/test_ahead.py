"""What each type of task names ahead of its start: the files that it will read, and nothing else."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmesh.tasks.catalogue import BUILTIN
from runners.ahead import Reader, files_of, prepare
from runners.api import Context
from runners.child import runner_of
from tests.kit.file_server import Served, Server
from tests.kit.tiny_models import write_tiny_lora

MakeContext = Callable[..., Context]
RUNNERS = {kind.name: kind.runner for kind in BUILTIN}


@pytest.fixture(scope="module")
def here(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths by the name that documents below use."""
    folder = tmp_path_factory.mktemp("ahead")
    write_tiny_lora(tiny_llama, folder / "lora")
    for name in ("rows", "eval"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": "a", "text": "a"}) + "\n")
    with tarfile.open(folder / "model.tar", "w") as archive:
        archive.add(tiny_llama, "model")
    (folder / "documents").mkdir()
    return {"MODEL": str(tiny_llama), **{name.upper(): str(folder / name) for name in os.listdir(folder)}}


def ahead(ctx: Context) -> list[str]:
    """The paths that a runner names, in its order."""
    found: list[str] = []

    class Names(Reader):
        def read(self, path: Path) -> None:
            found.append(os.path.realpath(path))

    ctx.unpacks = False
    for part in runner_of(RUNNERS[ctx.job.task_type]).ahead(ctx):
        prepare(ctx, part, Names(ctx, most_bytes=0))
    return found


SOURCE = {"source": {"type": "huggingface", "identifier": "MODEL"}}
CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("inference", {"model": SOURCE, "data": {"type": "list", "items": ["a"]}}, ["MODEL"]),
    (
        "inference",
        {"model": {**SOURCE, "adapters": [{"path": "LORA"}]}, "data": {"type": "jsonl", "path": "ROWS.JSONL"}},
        ["MODEL", "LORA", "ROWS.JSONL"],
    ),
    (
        "inference",
        {"checkpoint": {"load": {"path": "MODEL.TAR"}}, "data": {"type": "list", "items": ["a"]}},
        ["MODEL.TAR"],
    ),
    (
        "sft",
        {
            "model": SOURCE,
            "data": {"jsonl": {"path": "ROWS.JSONL"}, "eval": {"jsonl": {"path": "EVAL.JSONL"}}},
            "training": {"max_steps": 1, "eval_steps": 1},
        },
        ["MODEL", "ROWS.JSONL", "EVAL.JSONL"],
    ),
    (
        "embedding",
        {"embedding": {"model": "MODEL"}, "data": {"type": "jsonl", "path": "ROWS.JSONL"}},
        ["MODEL", "ROWS.JSONL"],
    ),
    ("score", {"score": {"model": "MODEL"}, "pairs": [["a", "b"]]}, ["MODEL"]),
    (
        "rag",
        {
            "query": "a",
            "embedding": {"model": "MODEL"},
            "faiss": {"path": "DOCUMENTS"},
            "generate": {},
            "model": SOURCE,
        },
        ["MODEL", "DOCUMENTS", "MODEL"],
    ),
    ("serve", {"model": SOURCE}, ["MODEL"]),
]


@pytest.mark.parametrize(
    ("task_type", "spec", "names"), CASES, ids=[f"{case[0]}-{at}" for at, case in enumerate(CASES)]
)
def test_a_type_names_what_it_will_read(
    make_context: MakeContext, here: dict[str, str], task_type: str, spec: dict[str, Any], names: list[str]
) -> None:
    text = json.dumps({"taskType": task_type, **spec})
    for name in sorted(here, key=len, reverse=True):
        text = text.replace(json.dumps(name), json.dumps(here[name]))
    assert ahead(make_context(json.loads(text), task_type=task_type)) == [
        os.path.realpath(here[name]) for name in names
    ]


def test_a_part_that_cannot_be_had_keeps_no_other_from_being_read(
    make_context: MakeContext, here: dict[str, str]
) -> None:
    model = {"source": {"type": "huggingface", "identifier": "/no/model"}}
    spec = {"model": model, "data": {"type": "jsonl", "path": here["ROWS.JSONL"]}}
    assert ahead(make_context(spec)) == [here["ROWS.JSONL"]]


def test_where_nothing_may_be_downloaded_no_server_is_asked(make_context: MakeContext, here: dict[str, str]) -> None:
    with Server() as server:
        server.files["rows.jsonl"] = Served(Path(here["ROWS.JSONL"]).read_bytes())
        model = {"source": {"type": "huggingface", "identifier": here["MODEL"]}}
        spec = {"model": model, "data": {"type": "jsonl", "url": server.url("rows.jsonl")}}
        ctx = make_context(spec)
        ctx.downloads = False
        assert ahead(ctx) == [os.path.realpath(here["MODEL"])]
        assert server.requests == []
        assert len(ahead(make_context(spec))) == 2
        assert [status for _, _, status in server.requests] == [200]


def test_of_a_folder_only_what_loading_reads(tmp_path: Path) -> None:
    read = ["1_Pooling/config.json", "config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
    other = [
        ".cache/x", "checkpoint-5/model.safetensors", "onnx/model.onnx", "optimizer.pt", "original/a.pth",
        "pytorch_model.bin", "runs/events",
    ]  # fmt: skip
    for name in (*read, *other):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in files_of(tmp_path)] == read
    (tmp_path / read[2]).unlink()
    assert tmp_path / "pytorch_model.bin" in files_of(tmp_path)


def test_no_more_is_read_than_the_bound_and_nothing_outside(make_context: MakeContext, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(20 << 20))
    reader = Reader(make_context({}), most_bytes=17 << 20)
    reader.read(tmp_path / "file")
    assert reader.read_bytes == 16 << 20
    with pytest.raises(OSError, match=r"lies where no task may read|outside"):
        reader.read(Path("/proc/self/environ"))
