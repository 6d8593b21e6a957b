"""docs/pipelines.md has every field of a pipeline."""

from __future__ import annotations

import pytest

from flowmesh.pipelines.fields import ALIASES, MAX_STAGES, Condition, Graph, Parallel, StageFields
from flowmesh.pipelines.progress import State
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
