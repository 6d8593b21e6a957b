"""Short work on the journal's disk: on the loop while it is quick, in a thread after it was slow, and back again."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

from flowmesh.execution.near_disk import QUICK_S, NearDisk
from flowmesh.node.folder_check import CheckedFolder


def test_it_moves_to_a_thread_while_the_disk_is_slow() -> None:
    disk = NearDisk(Path("/results"), lambda: True)

    def work(takes_s: float) -> bool:
        time.sleep(takes_s)
        return threading.current_thread() is threading.main_thread()

    async def story() -> list[bool]:
        return [await disk.run(work, takes_s) for takes_s in (0.0, 2 * QUICK_S, 2 * QUICK_S, 0.0, 0.0)]

    assert asyncio.run(story()) == [True, True, False, False, True]


def test_work_that_fails_slowly_counts_as_slow() -> None:
    disk = NearDisk(Path("/results"), lambda: True)

    def fail() -> None:
        time.sleep(2 * QUICK_S)
        raise OSError("no disk")

    async def story() -> threading.Thread:
        try:
            await disk.run(fail)
        except OSError:
            return await disk.run(threading.current_thread)
        raise AssertionError("its error is raised")

    assert asyncio.run(story()) is not threading.main_thread()


def test_only_folders_inside_results_dir_on_the_same_disk_are_near() -> None:
    shared = True
    disk = NearDisk(Path("/results"), lambda: shared)
    assert disk.has("/results/t-1")
    assert not disk.has("/results")
    assert not disk.has("/results-of-others/t-1")
    assert not disk.has("/elsewhere/t-1")
    shared = False
    assert not disk.has("/results/t-1")


def test_a_folders_file_system_is_known_once_it_was_looked_at(tmp_path: Path) -> None:
    assert CheckedFolder("results.dir", tmp_path).device == tmp_path.stat().st_dev
    adopted = CheckedFolder("results.dir", tmp_path, Path("/"))
    assert adopted.device is None
    assert not adopted.trouble()
    assert adopted.device == tmp_path.stat().st_dev
