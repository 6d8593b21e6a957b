"""What a node with an end can still take."""

from __future__ import annotations

import time

import pytest

from flowmesh.cli import node_ends
from flowmesh.cli.control_types import End, Ends
from flowmesh.cli.findings import Level
from flowmesh.errors import ConfigError
from flowmesh.execution.time_left import TimeLeft
from flowmesh.settings.load import load
from flowmesh.settings.moments import moment


def time_left(**flags: object) -> TimeLeft:
    return TimeLeft.of(load(None, {}, {key.replace("__", "."): str(value) for key, value in flags.items()}).settings)


def test_a_node_without_an_end_takes_everything() -> None:
    assert time_left().why_not(1e9) == ""
    assert time_left().why_not(None) == ""
    assert time_left().listed() is None


def test_a_task_needs_its_limit_else_the_nodes_default_else_the_margin() -> None:
    soon = time.time() + 1000
    left = time_left(node__ends_at=soon, node__ends_margin_s=400)
    assert left.why_not(500) == ""
    assert "spec.timeoutSec is 700 s" in left.why_not(700)
    assert left.why_not(None) == ""
    late = time_left(node__ends_at=soon, node__ends_margin_s=600)
    assert "without spec.timeoutSec it needs 600 s" in late.why_not(None)
    default = time_left(node__ends_at=soon, node__ends_margin_s=100, tasks__default_timeout_s=950)
    assert "needs 950 s" in default.why_not(None)


@pytest.mark.parametrize("text", ["2026-12-01T18:00:00Z", "2026-12-01T18:00:00+00:00", "2026-12-01 19:00:00+01:00"])
def test_times(text: str) -> None:
    assert moment(text) == moment("1796148000") == 1796148000.0


@pytest.mark.parametrize("text", ["2026-13-01T00:00:00", "-5", "tomorrow", "99999999999999"])
def test_no_times(text: str) -> None:
    with pytest.raises(ConfigError, match=r"node\.ends_at: expected a"):
        load(None, {}, {"node.ends_at": text})


def test_slurm_says_it_where_the_settings_do_not(tmp_path) -> None:
    slurm = {"SLURM_JOB_END_TIME": "1796148000"}
    loaded = load(None, slurm)
    assert loaded.settings.node.ends_at == 1796148000
    assert loaded.origins["node.ends_at"] == "SLURM_JOB_END_TIME"
    assert load(None, {"SLURM_JOB_END_TIME": "4294967295"}).settings.node.ends_at is None, "Slurm's word for never"
    file = tmp_path / "node.toml"
    file.write_text("[node]\nends_at = 2026-12-01T17:00:00Z\n")
    assert moment(load(file, slurm).settings.node.ends_at or 0) == 1796148000 - 3600


def test_status_and_doctor_have_words_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = list(node_ends.lines(Ends(end=End(at="A", drains_at="D", left_s=90), exit_when_idle_s=600, idle_s=5)))
    assert told[0] == "ends at A: drains at D (in 1.5 min); tasks that take longer are not taken"
    assert told[1].startswith("exits when it had no task for 10")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    unknown, given = node_ends.check(load(None, {}).settings)
    assert unknown.level is Level.WARN
    assert "Slurm job 7 gives" in given.text
    assert "GPUs 0,1" in given.text
    over = next(
        iter(node_ends.check(load(None, {}, {"node.ends_at": "1796148000", "node.ends_margin_s": "1"}).settings))
    )
    assert over.level is (Level.OK if time.time() < 1796147999 else Level.BROKEN)
