"""Old results: removed whatever a task made of its folder, reported as removed only when they are gone."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from loguru import logger

from flowmesh.execution.housekeeping.retention import Retention
from flowmesh.settings.schema import ResultsSettings
from flowmesh.tasks.journal import Journal
from flowmesh.tasks.machine import State, Task
from flowmesh.tasks.verdicts import Kind, Verdict
from tests.kit.hostile import bind, cannot_mount, in_child, make_deep

AT = "2026-01-01T00:00:00+00:00"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path


@pytest.fixture
def log() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logger.add(lambda line: lines.append(str(line)), format="{level} {message} {extra}")
    yield lines
    logger.remove(handler)


def sweep(home: Path, *folders: Path, rounds: int = 3) -> list[list[str]]:
    """Let the journal have a finished task for each folder, and go some rounds; returns the ids removed in each."""
    journal = Journal(home / "journal.sqlite")
    done = Task(state=State.DONE, verdict=Verdict(kind=Kind.OK))
    for folder in folders:
        attempt = journal.accept(
            task_id=folder.name, worker_id="w", dispatched_at=None, at=AT, message=b"", out_dir=str(folder)
        )
        journal.finish(attempt, done, AT, "channel", b"{}")
    retention = Retention(
        settings=ResultsSettings(keep_bytes=0), results_dir=home / "results", journal=journal, in_use=set
    )

    async def go() -> list[list[str]]:
        return [[each.task_id for each in await retention.sweep()] for _ in range(rounds)]

    try:
        return asyncio.run(go())
    finally:
        journal.close()


def test_a_deep_folder_and_one_without_rights_are_removed(home: Path, log: list[str]) -> None:
    deep, closed = home / "results" / "deep", home / "results" / "closed"
    for folder in (deep, closed):
        (folder / "artifacts").mkdir(parents=True)
    make_deep(deep / "artifacts", 1500, "d" * 100)
    (closed / "artifacts" / "file").touch()
    (closed / "artifacts").chmod(0o000)
    closed.chmod(0o555)

    def work() -> None:
        assert sweep(home, deep, closed)[0] == ["deep", "closed"]

    if os.geteuid() == 0:  # root lacks no rights
        for parent in (home, *home.parents[:3]):
            parent.chmod(parent.stat().st_mode | 0o111)
        subprocess.run(["chown", "-R", "nobody", home], check=True)
    in_child(work, user="nobody" if os.geteuid() == 0 else "")
    assert list((home / "results").iterdir()) == []


@pytest.mark.skipif(bool(why := cannot_mount()), reason=why or "-")
def test_what_cannot_be_removed_is_reported_once_and_never_as_removed(home: Path, log: list[str]) -> None:
    task, others = home / "results" / "t-1", home / "others"
    (task / "mount").mkdir(parents=True)
    others.mkdir()
    (others / "data").write_text("precious")

    def work() -> None:
        bind(others, task / "mount")
        assert sweep(home, task) == [[], [], []]
        assert len([line for line in log if "could not all be removed" in line]) == 1
        assert not [line for line in log if "old results removed" in line]

    in_child(work, mounts=True)
    assert (others / "data").read_text() == "precious"


def test_a_link_in_the_way_to_a_folder_leads_nowhere(home: Path) -> None:
    """The folder above belongs to another task, which replaced it by a link."""
    precious = home / "precious" / "t-1"
    precious.mkdir(parents=True)
    (home / "results" / "other").symlink_to(home / "precious")
    assert sweep(home, home / "results" / "other" / "t-1") == [[], [], []]
    assert precious.is_dir()
