"""The row log of agents: a retry runs only the items that have no answer, or whose files are gone."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("smolagents", reason="needs the extra 'agent'")

from flowmesh.messages.rows import read
from runners.agent.runner import AgentRunner
from runners.api import Cancelled, Context
from tests.kit.agent_support import agent_context
from tests.kit.openai_server import Fail, Server, answer, call

FILES = {"tools": {"files": True}}
BATCH = {"data": {"type": "list", "items": ["write", "think", "last"], "metadata": [{"n": 1}, {"n": 2}, {"n": 3}]}}
STEPS = (call("write_file", path="a.txt", content="left"), answer("written"), answer("thought"), answer("done"))


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    return tmp_path / "agents"


def run(make_context, agents: Path, steps: Any, *, spec: dict[str, Any] = BATCH, **fields: Any) -> tuple[Any, Context]:
    """One run against an endpoint that answers with `steps`, and has none left then; None: it was cancelled."""
    with Server(*steps).running() as server:
        ctx = agent_context(make_context, agents, server.url, config=FILES, spec=spec, **fields)
        with contextlib.suppress(Cancelled):
            return AgentRunner().run(ctx), ctx
    return None, ctx


def cancelled(make_context, agents: Path, done: int, monkeypatch, **fields: Any) -> Context:
    """A run that ends, as a cancel frame ends it, before the item `done`."""
    report = Context.progress

    def progress(self: Context, at: float, total: float | None = None, unit: str = "", **metrics: float) -> None:
        if unit == "items" and at == done:
            raise Cancelled
        report(self, at, total, unit, **metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "progress", progress)
        result, ctx = run(make_context, agents, STEPS, **fields)
    assert result is None
    return ctx


def _noting(told: list[float], report: Any) -> Any:
    def progress(self: Context, *given: Any, **metrics: float) -> None:
        told.extend([metrics["rows"]] if "rows" in metrics else [])
        report(self, *given, **metrics)

    return progress


def outputs(result: dict[str, Any]) -> list[tuple[int, str, int]]:
    return [(item["index"], item["output"], item["metadata"]["n"]) for item in result["items"]]


def test_a_cancelled_task_goes_on(make_context, agents, monkeypatch) -> None:
    told: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(Context, "progress", _noting(told, Context.progress))
        first = cancelled(make_context, agents, 2, monkeypatch)
    assert told == sorted(told)
    assert set(told) == {0, 1}, "progress says how many items are finished"
    assert first.rows is not None
    assert (first.rows.done, first.rows.total) == (2, 3)
    (first.out_dir / "workspace" / "0002").mkdir()
    (first.out_dir / "workspace" / "0002" / "half.txt").write_text("of a run that did not end")
    result, ctx = run(make_context, agents, [answer("done")], anew=False)
    assert outputs(result) == [(0, "written", 1), (1, "thought", 2), (2, "done", 3)]
    assert result["rows"] == {"done": 3, "total": 3, "reused": 2, "reused_tokens": 45}
    assert result["usage"]["total_tokens"] == 60
    assert result["usage"]["model_requests"] == 1, "of this attempt"
    assert (ctx.out_dir / "workspace" / "0000" / "a.txt").read_text() == "left"
    assert not (ctx.out_dir / "workspace" / "0002").exists()
    assert (ctx.out_dir / "batch_logs" / "task_1_output.txt").read_text() == "written\n"
    assert result["metadata"]["batch_summary"]["completed"] == 3
    with (ctx.out_dir / "rows.jsonl").open("rb") as file:
        assert sorted(read(file).current) == [0, 1, 2]


@pytest.mark.parametrize("how", ["gone", "another size", "another file"])
def test_an_item_whose_files_are_gone_is_run_again(how, make_context, agents, monkeypatch) -> None:
    first = cancelled(make_context, agents, 2, monkeypatch)
    folder = first.out_dir / "workspace" / "0000"
    if how == "gone":
        (folder / "a.txt").unlink()
    else:
        (folder / ("a.txt" if how == "another size" else "b.txt")).write_text("changed")
    result, ctx = run(make_context, agents, [*STEPS[:2], answer("done")], anew=False)
    assert result["rows"]["reused"] == 1
    assert outputs(result) == [(0, "written", 1), (1, "thought", 2), (2, "done", 3)]
    assert [path.name for path in (ctx.out_dir / "workspace" / "0000").iterdir()] == ["a.txt"]
    assert (ctx.out_dir / "workspace" / "0000" / "a.txt").read_text() == "left"


def test_rows_of_another_task_are_taken_where_they_need_no_files(make_context, agents, monkeypatch) -> None:
    cancelled(make_context, agents, 2, monkeypatch, task_id="earlier")
    spec = BATCH | {"resume": {"taskId": "earlier"}}
    result, _ = run(make_context, agents, [*STEPS[:2], answer("done")], spec=spec, task_id="later")
    assert result["rows"]["reused"] == 1
    assert outputs(result) == [(0, "written", 1), (1, "thought", 2), (2, "done", 3)]


def test_failed_items_and_other_instructions_are_run_again(make_context, agents) -> None:
    result, _ = run(make_context, agents, [*STEPS[:2], Fail(400), answer("done")])
    assert [item["finish_reason"] for item in result["items"]] == ["completed", "failed", "completed"]
    result, _ = run(make_context, agents, [answer("better")], anew=False)
    assert outputs(result)[1] == (1, "better", 2)
    assert result["rows"]["reused"] == 2
    spec = BATCH | {"agent": {"max_turns": 3}}
    result, _ = run(make_context, agents, STEPS, spec=spec, anew=False)
    assert "rows" not in result
    result, _ = run(make_context, agents, STEPS, spec=spec | {"resume": False}, anew=False)
    assert "rows" not in result
    result, _ = run(make_context, agents, (), spec=spec | {"agent": {"max_turns": 3, "timeout": 60}}, anew=False)
    assert result["rows"]["reused"] == 3, "a time limit is no other run"


def test_a_single_task_is_a_row(make_context, agents) -> None:
    one = {"task": "write"}
    _, ctx = run(make_context, agents, STEPS[:2], spec=one)
    result, _ = run(make_context, agents, (), spec=one, anew=False)
    assert result["items"][0]["output"] == "written"
    assert (ctx.out_dir / "workspace" / "a.txt").read_text() == "left"
    result, _ = run(make_context, agents, [answer("another")], spec={"task": "other"}, anew=False)
    assert not (ctx.out_dir / "workspace").exists() or not list((ctx.out_dir / "workspace").iterdir())
