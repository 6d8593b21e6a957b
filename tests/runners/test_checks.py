"""Checks of documents that run nothing: whatever is in a place, they answer with faults, never with an exception."""

from __future__ import annotations

import copy

import pytest

from flowmesh.cli.document_parser import parse
from flowmesh.tasks.catalogue import BUILTIN
from flowmesh.tasks.checks import check_agent_file, check_task
from tests.kit.paths import ROOT

TYPES = {kind.name: kind for kind in BUILTIN}
ODD = (3, "", "x", True, [1], {"a": 1})
TASKS = sorted((ROOT / "conf/tasks").glob("*.yaml"))
AGENTS = sorted((ROOT / "conf/agents").glob("*.yaml"))


def places(value, path=()):
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:2]):
            yield from places(inner, (*path, index))


def changed(document):
    """The document with something odd in each place, one at a time."""
    for path in places(document):
        for odd in ODD:
            made = copy.deepcopy(document)
            at = made
            for step in path[:-1]:
                at = at[step]
            at[path[-1]] = odd
            yield path, made


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_a_task_with_anything_anywhere_is_answered(path):
    document = parse(path.read_text(), path.name, as_json=False)
    assert check_task(document, TYPES)[0].faults == ()
    refused = 0
    for _, made in changed(document):
        refused += check_task(made, TYPES)[0].faults != ()
    assert refused > 0


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
def test_a_configuration_with_anything_anywhere_is_answered(path):
    document = parse(path.read_text(), path.name, as_json=False)
    assert check_agent_file(str(path), document).faults == ()
    assert any(check_agent_file(str(path), made).faults for _, made in changed(document))


def test_ppos_own_trainer_arguments_are_checked():
    document = parse((ROOT / "conf/tasks/ppo.yaml").read_text(), "ppo", as_json=False)
    document["spec"]["training"]["trainer_args"] = {"gama": 1}
    assert check_task(document, TYPES)[0].faults == (
        "spec.training.trainer_args.gama: unknown field; did you mean 'gamma'?",
    )


def test_a_rag_task_is_checked_without_its_key(monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    spec = {
        "taskType": "rag",
        "query": "q",
        "qdrant": {"collection": "c", "url": "http://q", "api_key_env": "SOME_KEY"},
    }
    assert check_task({"spec": spec}, TYPES)[0].faults == ()
