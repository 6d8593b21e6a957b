"""Fields that are accepted without effect: the table in docs/tasks.md, and the walk that takes them out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowmesh.errors import FieldError
from flowmesh.messages.output import read_output, unused_in_output
from flowmesh.validation.convert import convert
from flowmesh.validation.unused import ANY, TABLE, block_of, is_unused

DOCS = Path(__file__).parents[3] / "docs" / "tasks.md"


def documented() -> set[tuple[str, str, str, str]]:
    text = DOCS.read_text().partition("## Fields without effect (ours)")[2].partition("\n## ")[0]
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    return {(block, name, only, why) for block, names, only, why in (c for c in cells if len(c) == 4)
            for name in re.findall(r"`([^`]+)`", names)}  # fmt: skip


def test_the_documents_table_is_the_codes() -> None:
    rows = set()
    for entry in TABLE:
        block = {"*": "any block", "": "`spec`"}.get(entry.block, f"`{entry.block}`")
        only = "any"
        if entry.only is not ANY:
            values = [str(each).lower() if isinstance(each, bool) else str(each) for each in entry.only]  # type: ignore[attr-defined]
            only = ", ".join(f"`{value}`" for value in values) or "null"
        rows |= {(block, name, only, entry.why) for name in entry.names}
    assert documented() == rows


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    identifier: str = ""


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    source: Inner | None = None
    many: list[Inner] = []
    stream: bool | None = None
    free: Any = None


def test_fields_of_the_table_are_taken_out_at_every_depth() -> None:
    unused: list[str] = []
    value = {
        "source": {"identifier": "m", "license": "MIT", "notes": "why"},
        "many": [{"notes": 1}, {"identifier": "b"}],
        "config": {"fp16": False},
        "free": {"notes": "kept"},
    }
    found = convert(value, Outer, where="spec.model", unused=unused)
    assert (found.source, found.many) == (Inner("m"), [Inner(""), Inner("b")])
    assert found.free == {"notes": "kept"}
    assert unused == ["spec.model.source.license", "spec.model.source.notes", "spec.model.many[0].notes",
                      "spec.model.config"]  # fmt: skip
    assert value["config"] == {"fp16": False}, "the document itself stays as it is"


def test_without_a_list_for_them_they_are_refused_as_in_settings() -> None:
    with pytest.raises(FieldError, match=r"spec\.model\.notes: unknown field"):
        convert({"notes": "x"}, Outer, where="spec.model")


def test_a_field_that_the_block_has_keeps_its_meaning() -> None:
    unused: list[str] = []
    assert convert({"stream": False}, Outer, where="spec.inference", unused=unused).stream is False
    assert unused == []


def test_all_faults_are_in_one_error_beside_what_is_accepted() -> None:
    with pytest.raises(FieldError) as caught:
        convert(
            {"notes": "x", "sorce": {}, "many": [{"identifier": 3}], "free": 1}, Outer, where="spec.model", unused=[]
        )
    assert caught.value.faults == (
        "spec.model.sorce: unknown field; did you mean 'source'?",
        "spec.model.many[0].identifier: expected text, found 3; put it in quotes",
    )
    assert str(caught.value) == " Also ".join(caught.value.faults)


@pytest.mark.parametrize(
    ("block", "name", "value", "accepted"),
    [
        ("training", "push_to_hub", False, True),
        ("training", "push_to_hub", "False", True),
        ("training", "push_to_hub", None, True),
        ("training", "push_to_hub", True, False),
        ("generation", "top_k", 0.0, True),
        ("generation", "top_k", 50, False),
        ("generation", "top_p", True, False),
        ("lora", "modules_to_save", ["lm_head"], False),
        ("lora", "modules_to_save", None, True),
        ("model", "config", {"anything": 1}, True),
        ("inference", "config", {}, False),
        ("data.template", "notes", "x", True),
    ],
)
def test_only_values_that_change_nothing_are_accepted(block: str, name: str, value: Any, accepted: bool) -> None:
    assert is_unused(block, name, value) is accepted


@pytest.mark.parametrize(
    ("where", "block"),
    [
        ("spec", ""),
        ("spec.model.adapters[3]", "model.adapters"),
        ("merge_children[1].spec.inference", "inference"),
        ("spec.data.eval", "data"),
        ("spec.generate", "inference"),
    ],
)
def test_blocks(where: str, block: str) -> None:
    assert block_of(where) == block


def test_output_has_the_same_rule() -> None:
    value = {"notes": "x", "destination": {"type": "http", "url": "http://h/x", "path": "/p", "retries": 3}}
    assert read_output(value).destination.url == "http://h/x"  # type: ignore[union-attr]
    assert unused_in_output(value) == [
        "spec.output.notes",
        "spec.output.destination.path",
        "spec.output.destination.retries",
    ]
    with pytest.raises(FieldError, match=r"timeout: unknown field; did you mean 'timeoutSec'"):
        read_output({"destination": {"type": "http", "url": "http://h/x", "timeout": 3}})
