"""docs/pipelines.md has every field of a pipeline, and the examples are valid."""

from __future__ import annotations

import pytest

from flowmesh.cli.checked_file import check_file
from flowmesh.pipelines.fields import ALIASES, MAX_STAGES, Condition, Graph, Parallel, StageFields
from flowmesh.pipelines.progress import State
from flowmesh.tasks.catalogue import BUILTIN
from tests.kit.paths import ROOT

TEXT = (ROOT / "docs/pipelines.md").read_text()


@pytest.mark.parametrize("struct", [StageFields, Parallel, Condition, Graph])
def test_every_field_is_documented(struct):
    prefix = {Parallel: "parallel.", Condition: "condition.", Graph: "spec.graph."}.get(struct, "")
    missing = [name for name in struct.__struct_fields__ if f"`{prefix}{name}`" not in TEXT]
    assert missing == []


def test_states_aliases_and_limits_are_documented():
    missing = [
        name for name in (*(state.value for state in State), *ALIASES, str(MAX_STAGES)) if f"`{name}`" not in TEXT
    ]
    assert missing == []


def test_every_example_is_valid_and_documented():
    examples = sorted((ROOT / "conf/tasks/pipelines").glob("*.yaml"))
    assert {path.stem for path in examples if f"`{path.stem}`" in TEXT} == {path.stem for path in examples} != set()
    types = {kind.name: kind for kind in BUILTIN}
    checked = [check_file(str(path), types) for path in examples]
    assert [(each.file, each.errors, each.warnings) for each in checked if each.errors or each.warnings] == []
    assert {each.kind for each in checked} == {"pipeline"}
