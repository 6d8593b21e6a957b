"""The node's log file is written by a thread: a disk that does not answer holds nobody up."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from loguru import logger

from flowmesh.startup.log_writer import FileWriter


@pytest.fixture(autouse=True)
def no_handlers() -> Iterator[None]:
    """As when the node sets up its log."""
    logger.remove()
    yield
    logger.add(sys.stderr)


class Hung(FileWriter):
    """On a disk that does not answer yet."""

    def __init__(self, path: Path) -> None:
        self.answers = threading.Event()
        super().__init__(str(path), rotation="64 MB", kept=2)

    def _put(self, data: bytes) -> bool:
        self.answers.wait()
        return super()._put(data)


def test_a_file_that_cannot_be_written_now_holds_nobody_up(tmp_path: Path) -> None:
    log = Hung(tmp_path / "log")
    lines = [f'{{"text": "line {number}"}}\n' for number in range(200)]
    for line in lines:
        log.write(line)
    assert not log.drain(0.05)
    assert not (tmp_path / "log").exists()
    log.answers.set()
    assert log.drain(10)
    assert (tmp_path / "log").read_text() == "".join(lines)


def test_files_are_rotated_and_the_oldest_go(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = FileWriter(str(path), rotation="1 KB", kept=2)
    for number in range(100):
        log.write(f"{number:99}\n")
    assert log.drain(10)
    assert path.read_text().endswith("99\n")
    assert len(list(tmp_path.iterdir())) == 3
