"""Old results: removed whatever a task made of its folder, reported as removed only when they are gone."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from loguru import logger

from flowmesh.execution.housekeeping.retention import Retention
from flowmesh.settings.schema import ResultsSettings
from flowmesh.tasks.journal import Journal, Placed
from flowmesh.tasks.machine import State, Task
from flowmesh.tasks.verdicts import Kind, Verdict
from tests.kit.hostile import bind, cannot_mount, in_child, make_deep

AT = "2026-01-01T00:00:00+00:00"
ALL_GO = ResultsSettings(keep_days=1)
"""Not `keep_bytes`: a file system may show the size of a new file seconds later."""
NONE_GOES = ResultsSettings(keep_bytes=1 << 40)


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
    retention = Retention(settings=ALL_GO, results_dir=home / "results", journal=journal, in_use=set)

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


class CountingJournal(Journal):
    """Counts the attempts that are read of it for retention."""

    read = 0

    def placed(self, after: int, limit: int) -> list[Placed]:
        rows = super().placed(after, limit)
        self.read += len(rows)
        return rows

    def placed_of(self, attempts: Sequence[int]) -> list[Placed]:
        rows = super().placed_of(attempts)
        self.read += len(rows)
        return rows


class Home:
    """A journal, the results of its tasks, and what retention makes of them."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("flowmesh.execution.housekeeping.retention.PAGE", 10)
        monkeypatch.setattr("flowmesh.tasks.journal.KEPT_DONE", 50)
        self.results = home / "results"
        self.journal = CountingJournal(home / "journal.sqlite")
        self.retention = self.of(NONE_GOES)

    def of(self, settings: ResultsSettings) -> Retention:
        return Retention(settings=settings, results_dir=self.results, journal=self.journal, in_use=set)

    def accept(self, task_id: str) -> int:
        out_dir = str(self.results / task_id)
        return self.journal.accept(
            task_id=task_id, worker_id="w", dispatched_at=None, at=AT, message=b"", out_dir=out_dir
        )

    def finish(self, attempt: int, kind: Kind = Kind.OK) -> None:
        done = Task(state=State.DONE, verdict=Verdict(kind=kind))
        self.journal.finish(attempt, done, AT, "channel", b"{}")

    def end(self, task_id: str, kind: Kind = Kind.OK, *, files: bool = True) -> int:
        if files:
            (self.results / task_id).mkdir(exist_ok=True)
        attempt = self.accept(task_id)
        self.finish(attempt, kind)
        return attempt

    def sweep(self, retention: Retention | None = None) -> tuple[list[str], int]:
        """One round: the ids of removed tasks, and how many attempts were read."""
        before = self.journal.read
        removed = asyncio.run((retention or self.retention).sweep())
        return [each.task_id for each in removed], self.journal.read - before


@pytest.fixture
def kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    made = Home(home, monkeypatch)
    yield made
    made.journal.close()


def test_a_round_reads_only_what_is_new(kept: Home) -> None:
    running = kept.accept("running")
    for n in range(95):
        kept.end(f"t-{n}", files=n < 5)
    assert kept.sweep() == ([], 96)
    assert len(kept.journal.placed(0, 1000)) == 56, "beyond the last 50 only what has results, and what has not ended"
    assert kept.sweep() == ([], 1), "the one that runs"
    kept.end("t-95")
    (kept.results / "running").mkdir()
    kept.finish(running)
    assert kept.sweep() == ([], 2)
    assert kept.sweep() == ([], 0)
    kept.retention._settings = ALL_GO
    removed, read = kept.sweep()
    assert sorted(removed) == sorted(["running", "t-95", *(f"t-{n}" for n in range(5))])
    assert read == 0
    assert kept.sweep() == ([], 0)


def test_what_was_delivered_after_all_may_go(kept: Home) -> None:
    attempt = kept.end("t", Kind.DELIVERY_FAILED)
    retention = kept.of(ALL_GO)
    assert kept.sweep(retention) == ([], 1)
    assert kept.sweep(retention) == ([], 1), "its delivery may have succeeded"
    kept.journal.update(attempt, Task(state=State.DONE, verdict=Verdict(kind=Kind.OK)))
    assert kept.sweep(retention) == (["t"], 1)


def test_a_folder_counts_for_the_last_attempt_at_its_task(kept: Home) -> None:
    for _ in range(2):
        kept.end("again", Kind.ERROR)
    kept.end("again", Kind.DELIVERY_FAILED)
    retention = kept.of(ALL_GO)
    assert kept.sweep(retention) == ([], 3)
    kept.end("again")
    assert kept.sweep(retention)[0] == ["again"]


def test_results_that_were_out_of_reach_are_found_again(kept: Home) -> None:
    """Their disk was not mounted for a while."""
    kept.end("t")
    assert kept.sweep() == ([], 1)
    elsewhere = kept.results.with_name("elsewhere")
    kept.results.rename(elsewhere)
    kept.results.mkdir()
    assert kept.sweep() == ([], 1)
    kept.results.rmdir()
    elsewhere.rename(kept.results)
    kept.retention._settings = ALL_GO
    assert kept.sweep() == (["t"], 1)
