"""`jsonl_export.path` of a stage that delivered over http is a URL: later stages read it wherever a path may be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from runners.api import BadRequest
from runners.data.sources import load_items
from runners.training.inputs import fetch_jsonl
from runners.training.settings import Jsonl
from tests.kit.file_server import Served, Server

LINES = b'{"prompt": "one", "output": "1"}\n{"prompt": "two", "output": "2"}\n'


@pytest.fixture
def server() -> Iterator[Server]:
    with Server().running() as running:
        running.files["r/t-1/files/export.jsonl"] = Served(LINES)
        yield running


def test_training_reads_it(server: Server, make_context) -> None:
    url = server.url("r/t-1/files/export.jsonl")
    found = fetch_jsonl(Jsonl(path=url), make_context({}))
    assert found.path.read_bytes() == LINES
    assert found.name == "export.jsonl"


def test_inference_reads_it(server: Server, make_context) -> None:
    url = server.url("r/t-1/files/export.jsonl")
    spec = {"data": {"type": "jsonl", "path": url, "column": "prompt"}}
    assert load_items(make_context(spec), spec).prompts == ("one", "two")


def test_one_that_is_not_there_is_named_by_its_field(server: Server, make_context) -> None:
    with pytest.raises(BadRequest, match=r"spec.data.jsonl.path: the server answered 404"):
        fetch_jsonl(Jsonl(path=server.url("gone.jsonl")), make_context({}))
