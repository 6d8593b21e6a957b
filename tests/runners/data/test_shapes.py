"""Shapes that documents of the field have: texts as lists of lines, and a configuration that is really a split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runners.api import BadRequest, Context
from runners.data.prompts import Items
from runners.data.sources import load_items
from runners.run_warnings import collected

ROWS = [{"text": f"row {i}", "lines": [f"row {i}", "second line"]} for i in range(10)]
Make = Callable[..., Context]


def load(make_context: Make, data: dict[str, Any], **spec: Any) -> Items:
    ctx = make_context({"data": data, **spec})
    return load_items(ctx, ctx.spec)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_column_of_lists_of_strings_is_lines(make_context: Make, tmp_path: Path) -> None:
    rows = [*ROWS[:2], {"lines": []}, {"lines": None}]
    data = {"type": "jsonl", "path": str(jsonl(tmp_path / "x.jsonl", rows)), "column": "lines"}
    assert load(make_context, data).prompts == ("row 0\nsecond line", "row 1\nsecond line", "", "")
    listed = {"type": "list", "items": [["one", "two"], "three"]}
    assert load(make_context, listed).prompts == ("one\ntwo", "three")
    with pytest.raises(BadRequest, match="expected a string or a list"):
        load(make_context, {"type": "list", "items": [[]]})


GRAPH = {"label": "Benefits", "node": "a", "path": "result.x"}


@pytest.mark.parametrize(
    "template", [{"name": "two_column_briefing"}, {"text": "{intro}\n\n- {col0_label}: {col0_value}\n\n{closing}"}]
)
def test_intro_and_closing_may_be_lines(make_context: Make, template: dict[str, Any]) -> None:
    def prompt(intro: Any, closing: Any) -> Any:
        options = {"intro": intro, "closing": closing}
        data = {"type": "graph_template", "template": {**template, "columns": [GRAPH], "options": options}}
        return load(make_context, data, _upstreamResults={"a": {"x": "less smoke"}}).prompts[0]

    whole = prompt(["See this.", "Weigh it."], ["Answer.", "Be brief."])
    assert whole == "See this.\nWeigh it.\n\n- Benefits: less smoke\n\nAnswer.\nBe brief."
    assert whole == prompt("See this.\nWeigh it.", "Answer.\nBe brief.")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with splits of names of their own, as published preference data have."""
    pytest.importorskip("datasets", reason="needs datasets (extra 'training')")
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name, rows in (("train_prefs", ROWS), ("test_prefs", ROWS[7:])):
        jsonl(folder / f"{name}-00000-of-00001.jsonl", rows)
    return folder.parent


@pytest.mark.parametrize("saved", [False, True])
def test_a_configuration_that_is_a_split(make_context: Make, published: Path, tmp_path: Path, saved: bool) -> None:
    if saved:
        import datasets

        parts = {"train_prefs": datasets.Dataset.from_list(ROWS), "test_prefs": datasets.Dataset.from_list(ROWS[7:])}
        published = tmp_path / "saved"
        datasets.DatasetDict(parts).save_to_disk(published)
    data = {"type": "dataset", "url": str(published), "name": "train_prefs", "split": "train[:3]"}
    ctx = make_context({"data": data})
    with collected(ctx):
        assert load_items(ctx, ctx.spec).prompts == ("row 0", "row 1", "row 2")
    assert any("'train_prefs[:3]'" in each for each in ctx.warnings)
    assert load(make_context, {**data, "name": "test_prefs", "split": "train"}).prompts == ("row 7", "row 8", "row 9")
    with pytest.raises(BadRequest, match=r"spec\.data\.name"):
        load(make_context, {**data, "name": "train_perfs"})
    with pytest.raises(BadRequest, match=r"spec\.data\.name"):
        load(make_context, {**data, "split": "test_prefs[:2]"})
