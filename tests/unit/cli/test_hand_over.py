"""Which documents a running node takes over from `flowmesh run`, and with which paths."""

from __future__ import annotations

import pytest

from flowmesh.cli.documents import Submission
from flowmesh.cli.hand_over import absolute, objection
from flowmesh.cli.local import LocalOptions


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("/etc")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def status(**more):
    return {"results_dir": "/r", "task_types": ["inference", "sft", "echo"], "permits": {"read_roots": []}, **more}


def why(spec, options=None, **more):
    document = {"spec": {"taskType": "inference", **spec}}
    submission = Submission(source="x", task_id="t", document=document)
    return objection(status(**more), options or LocalOptions(), [submission])


def test_paths_that_are_there_become_absolute(files):
    spec = {
        "model": {"source": {"identifier": "model"}, "adapters": [{"path": "no"}]},
        "data": {"type": "jsonl", "path": "data/rows.jsonl", "items": ["model"]},
        "output": {"destination": {"path": "data"}},
        "stages": [{"name": "model", "spec": {"data": {"jsonl": {"path": "data/rows.jsonl"}}}}],
    }
    made = absolute({"spec": spec})["spec"]
    assert made["model"] == {"source": {"identifier": str(files / "model")}, "adapters": [{"path": "no"}]}
    assert made["data"] == {"type": "jsonl", "path": str(files / "data/rows.jsonl"), "items": ["model"]}
    assert made["output"] == spec["output"]
    assert made["stages"][0] == {
        "name": "model",
        "spec": {"data": {"jsonl": {"path": str(files / "data/rows.jsonl")}}},
    }


def test_files_below_the_nodes_roots_only(files):
    spec = {"data": {"path": "data/rows.jsonl"}}
    assert why(spec) == f"its tasks may not read {files}/data/rows.jsonl (tasks.read_roots)"
    assert why(spec, permits={"read_roots": [str(files / "data")]}) == ""
    assert why(spec, permits={"read_roots": [f"{files}/*"]}) == ""
    assert why({"data": {"path": "link/passwd"}}, permits={"read_roots": [str(files)]}) != ""
    assert why(spec, results_dir=str(files)) == ""


@pytest.mark.parametrize(
    ("spec", "more", "found"),
    [
        ({}, {}, ""),
        ({}, {"draining": "finish"}, "it drains"),
        ({}, {"results_dir": None}, "older version"),
        ({"taskType": "rag"}, {}, "it does not offer rag"),
        ({"stages": [{"name": "a", "spec": {"taskType": "dpo"}}]}, {}, "it does not offer dpo"),
        ({"model": {"transformers": {"trust_remote_code": True}}}, {}, "does not run code of models"),
        ({"model": {"transformers": {"trust_remote_code": False}}}, {}, ""),
        ({"qdrant": {"url": "http://localhost:6333"}}, {}, "may not reach this machine"),
        ({"qdrant": {"url": "http://localhost:6333"}}, {"permits": {"local_hosts": True}}, ""),
        ({"data": {"items": ["${HOME}"], "url": "https://example.org/x"}}, {}, ""),
    ],
)
def test_what_a_node_would_do_otherwise(spec, more, found):
    assert found in why(spec, **more)
    assert bool(found) == bool(why(spec, **more))


def test_results_where_the_user_wants_them():
    assert why({}, LocalOptions(results_dir="/elsewhere")) == "its results go to /r"
    assert why({}, LocalOptions(results_dir="/r/")) == ""
