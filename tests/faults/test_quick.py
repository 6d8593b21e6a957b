"""A short run of the fault matrix, with the program that also does the full one: `scripts/faults --long`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.support import ROOT, RedisServer

pytestmark = [pytest.mark.redis, pytest.mark.slow]


def test_the_quick_matrix_finds_nothing(redis_server: RedisServer, tmp_path: Path) -> None:
    table = tmp_path / "faults.md"
    command = [sys.executable, "-m", "tests.faults.matrix", "--quick", "--verbose", "--output", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "**0 violations**" in table.read_text()
    assert max(map(len, done.stdout.splitlines())) <= 100
