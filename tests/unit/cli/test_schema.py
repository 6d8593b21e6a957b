"""`flowmesh schema`: the shipped files are what it prints, and the examples fit them."""

from __future__ import annotations

import json
import tomllib

import jsonschema
import pytest

from flowmesh.cli.document_parser import parse
from flowmesh.cli.main import main
from flowmesh.tasks.catalogue import BUILTIN
from tests.kit.paths import ROOT

KINDS = ("task", "pipeline", "agent", "node")
EXAMPLES = sorted((ROOT / "conf/tasks").glob("*.yaml"))
PIPELINES = sorted((ROOT / "conf/tasks/pipelines").glob("*.yaml"))
AGENTS = sorted(
    path
    for path in (ROOT / "conf/agents").rglob("*.yaml")
    if not path.parent.name.startswith("_") and path.name != "search_providers.yaml"
)


@pytest.fixture(scope="module")
def validators():
    made = {}
    for kind in KINDS:
        schema = json.loads((ROOT / f"conf/schema/{kind}.json").read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        made[kind] = jsonschema.Draft202012Validator(schema)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_schema_is_what_the_command_prints(kind, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["schema", kind])
    assert caught.value.code == 0
    shipped = (ROOT / f"conf/schema/{kind}.json").read_text()
    assert capsys.readouterr().out == shipped, f"write it again: flowmesh schema {kind} > conf/schema/{kind}.json"


def test_examples_fit_and_name_their_schema(validators):
    for path in EXAMPLES:
        document = parse(path.read_text(), path.name, as_json=False)
        assert [error.message for error in validators["task"].iter_errors(document)] == [], path
        assert "# yaml-language-server: $schema=../schema/task.json" in path.read_text().splitlines(), path
    assert PIPELINES
    for path in PIPELINES:
        document = parse(path.read_text(), path.name, as_json=False)
        assert [error.message for error in validators["pipeline"].iter_errors(document)] == [], path
        assert "# yaml-language-server: $schema=../../schema/pipeline.json" in path.read_text().splitlines(), path
    for path in AGENTS:
        document = parse(path.read_text(), path.name, as_json=False)
        assert [error.message for error in validators["agent"].iter_errors(document)] == [], path
    node = tomllib.loads((ROOT / "conf/node.toml").read_text())
    assert [error.message for error in validators["node"].iter_errors(node)] == []


def test_every_type_has_a_branch_with_its_sections(validators):
    branches = validators["task"].schema["properties"]["spec"]["allOf"]
    named = {branch["if"]["properties"]["taskType"]["const"]: branch["then"]["properties"] for branch in branches}
    assert set(named) == {kind.name for kind in BUILTIN}
    assert all(
        "data" in sections for name, sections in named.items() if name not in {"echo", "command", "python", "serve"}
    )


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"taskType": "inference", "inference": {"top_p": 1.5}}, ["spec", "inference"]),
        ({"taskType": "inference", "inference": {"top_q": 1}}, ["spec", "inference"]),
        ({"taskType": "inference", "inference": {"num_beams": 4}}, ["spec", "inference"]),
        ({"taskType": "inference", "data": {"type": "lst"}}, ["spec", "data"]),
        ({"taskType": "inference", "data": {"type": "list", "rows": []}}, ["spec", "data"]),
        ({"taskType": "sft", "training": {"batch_size": 0}}, ["spec", "training"]),
        ({"taskType": "sft", "training": {"steps": 1}}, ["spec", "training"]),
        ({"taskType": "rag", "qdrant": {}}, ["spec", "qdrant"]),
        ({"taskType": "agent", "agent": {"timeout": -1}}, ["spec", "agent"]),
        ({"taskType": "echo", "timeoutSec": 0}, ["spec", "timeoutSec"]),
        ({"taskType": "echo", "output": {"destination": {"type": "ftp"}}}, ["spec", "output"]),
    ],
)
def test_what_the_runners_refuse_does_not_fit(validators, spec, path):
    (error,) = validators["task"].iter_errors({"spec": spec})
    assert list(error.absolute_path)[: len(path)] == path


@pytest.mark.parametrize(
    "spec",
    [
        {"taskType": "inference", "inference": {"num_beams": 1, "notes": "x", "stream": None}, "x": 1},
        {"taskType": "sft", "training": {"run_name": "x", "trainer_args": {"any": 1}}, "generation": {"any": 1}},
        {"taskType": "inference", "model": {"source": {"identifier": "a", "cache_dir": "/x"}}, "data": None},
        {"taskType": "another", "model": 3},
    ],
)
def test_what_has_no_effect_fits(validators, spec):
    assert [error.message for error in validators["task"].iter_errors({"spec": spec})] == []
