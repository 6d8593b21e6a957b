"""qdrant-client's local mode keeps its points as pickles: only data of them is read."""

from __future__ import annotations

import datetime
import json
import os
import pickle
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qdrant_client", reason="needs qdrant-client")
import numpy as np
from qdrant_client import QdrantClient, models

from runners.api import BadRequest, Context
from runners.rag.qdrant_search import open_qdrant
from runners.rag.qdrant_store import loads
from runners.rag.task import Qdrant

MakeContext = Callable[..., Context]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    client = QdrantClient(path=str(tmp_path / "store"))
    client.create_collection("c", vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT))
    client.upsert("c", [models.PointStruct(id=1, vector=[1.0, 2.0], payload={"text": "a", "list": [1, {"b": None}]})])
    client.close()
    return tmp_path / "store"


def test_a_pickle_in_a_store_runs_nothing(make_context: MakeContext, store: Path, tmp_path: Path) -> None:
    with sqlite3.connect(store / "collection" / "c" / "storage.sqlite") as storage:
        storage.execute("UPDATE points SET point = ?", (pickle.dumps(Evil(tmp_path / "ran")),))
    with pytest.raises(BadRequest, match=r"spec\.qdrant\.path: .*more than data"):
        open_qdrant(make_context({}), Qdrant(collection="c", path=str(store)))
    assert not (tmp_path / "ran").exists()


def test_a_sound_store_is_read(make_context: MakeContext, store: Path) -> None:
    searcher = open_qdrant(make_context({}), Qdrant(collection="c", path=str(store)))
    hits = searcher.search(make_context({}), np.array([[1.0, 0.0]], dtype=np.float32), 1)
    assert hits[0][0].payload == {"text": "a", "list": [1, {"b": None}]}


def test_a_store_names_no_folder_of_others(make_context: MakeContext, store: Path) -> None:
    meta = json.loads((store / "meta.json").read_text())
    meta["collections"] = {"../../../elsewhere": meta["collections"]["c"]}
    (store / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(BadRequest, match="outside of the folder"):
        open_qdrant(make_context({}), Qdrant(collection="c", path=str(store)))
    assert not (store.parent / "elsewhere").exists()


def test_data_survives() -> None:
    sparse = models.SparseVector(indices=[1], values=[0.5])
    for value in (
        models.PointStruct(id=str(uuid.UUID(int=5)), vector={"s": sparse}, payload={"at": 1}),
        {"when": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), "id": uuid.UUID(int=5), "set": {1}},
    ):
        assert loads(pickle.dumps(value)) == value
    assert np.array_equal(loads(pickle.dumps(np.arange(3, dtype=np.float32))), np.arange(3, dtype=np.float32))
    assert loads(pickle.dumps(np.float32(1.5))) == np.float32(1.5)


@pytest.mark.parametrize("value", [Evil(Path("/x")), os.system, pickle.loads, eval])
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(pickle.UnpicklingError):
        loads(pickle.dumps(value))


def test_names_with_dots_reach_nothing() -> None:
    data = b"\x80\x04\x8c\x23qdrant_client.http.models.models\x8c\x08BaseModel.__subclasses__\x93."
    with pytest.raises((pickle.UnpicklingError, EOFError, UnicodeDecodeError)):
        loads(data)
