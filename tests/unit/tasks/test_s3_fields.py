"""Addresses of S3 in documents: what they mean, and what the operator's patterns allow."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowmesh.cli.checked_file import check_file
from flowmesh.settings.schema import CloudSettings, Settings
from flowmesh.tasks.catalogue import known_types
from flowmesh.tasks.s3_fields import faults
from flowmesh.validation.s3_url import Location, is_allowed, matches, parse


@pytest.mark.parametrize(
    ("patterns", "url", "allowed"),
    [
        (("s3://data",), "s3://data/any/key", True),
        (("s3://data",), "s3://data/", True),
        (("s3://data",), "s3://database/key", False),
        (("s3://data/",), "s3://data/key", True),
        (("s3://data/a",), "s3://data/a/key", True),
        (("s3://data/a",), "s3://data/a", True),
        (("s3://data/a/",), "s3://data/ab", False),
        (("s3://data/a/",), "s3://data/", False),
        (("s3://data/*.jsonl",), "s3://data/x/y.jsonl", True),
        (("s3://data/*.jsonl",), "s3://data/x/y.csv", False),
        (("s3://team-*",), "s3://team-a/x", True),
        (("s3://data/[x]",), "s3://data/x", False),
        (("s3://data/[x]",), "s3://data/[x]", True),
        (("s3://*",), "s3://anything/x", True),
        ((), "s3://data/x", False),
    ],
)
def test_patterns(patterns: tuple[str, ...], url: str, allowed: bool) -> None:
    assert is_allowed(patterns, parse(url)) is allowed


def test_keys_are_literal() -> None:
    assert parse("s3://b-1.x/a b/ü?q#f%20") == Location("b-1.x", "a b/ü?q#f%20")
    for bad in (
        "s3://",
        "s3://b",
        "s3://-b-/x",
        "s3://bucket/a/../b",
        "s3://bucket/a//b",
        "s3://bucket/\n",
        "http://x",
    ):
        with pytest.raises(ValueError, match=r".+"):
            parse(bad)


@pytest.mark.parametrize(
    ("key", "pattern", "same"),
    [
        ("a/b.txt", "a/*.txt", True),
        ("a/c/b.txt", "a/*.txt", False),
        ("a/c/b.txt", "a/**/*.txt", True),
        ("a/b.txt", "a/**/*.txt", True),
        ("a/b1", "a/b[0-9]", True),
        ("a/bx", "a/b[!0-9]", True),
        ("a/b.", "a/b?", True),
        ("a/b/", "a/b?", False),
        ("a+b", "a+b", True),
    ],
)
def test_patterns_of_keys(key: str, pattern: str, same: bool) -> None:
    assert matches(key, pattern) is same


def test_only_fields_that_name_places_are_checked() -> None:
    spec = {
        "data": {"type": "jsonl", "path": "s3://data/x-*.jsonl"},
        "model": {"source": {"identifier": "s3://models/../m"}},
        "prompt": "s3://not a place",
        "data2": {"items": [{"url": "s3://a row's own"}]},
        "resume": {"url": "s3://data/${sft.result.key}"},
        "output": {"destination": {"url": "s3://elsewhere/x"}},
    }
    found = list(faults(spec, ["s3://data/y"]))
    assert [each.partition(":")[0] for each in found] == ["spec.data.path", "spec.model.source.identifier"]
    assert "the operator does not allow documents to read it" in found[0]
    assert list(faults(spec, ["s3://data"])) == list(faults(spec)) == found[1:]
    assert "this node reads nothing from S3" in next(faults(spec, []))


def test_validate_knows_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(
        "spec:\n  taskType: inference\n  data:\n    type: jsonl\n    path: s3://data/x\n"
        "  model: {source: {identifier: m}}\n"
        "  output:\n    destination:\n      type: s3\n      url: s3://data/results\n"
    )
    types = known_types(Settings())
    assert not check_file(str(file), types).errors
    assert not check_file(
        str(file), types, cloud=CloudSettings(read=("s3://data",), write=("s3://data/results",))
    ).errors
    found = check_file(str(file), types, cloud=CloudSettings(read=("s3://other",), write=("s3://data/re",))).errors
    assert [(each.line, each.message.partition(": ")[0]) for each in found] == [
        (5, "spec.data.path"),
        (10, "spec.output.destination.url"),
    ]
