"""What a node's processes keep of the memory that they needed for a moment."""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kit.paths import ROOT
from tests.kit.support import Node

GLIBC = platform.libc_ver()[0] == "glibc"

ARENA_BYTES = 64 << 20
"""What glibc reserves for an arena of threads, at an address that is a multiple of it."""


def arenas(pid: int) -> list[str]:
    """The mappings of a process that are arenas of its threads: the part in use, then the reserved rest."""
    found = []
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    for used, rest in itertools.pairwise(lines):
        start = int(used.partition("-")[0], 16)
        end = int(rest.split()[0].partition("-")[2], 16)
        if start % ARENA_BYTES == 0 and end == start + ARENA_BYTES and rest.split()[1] == "---p":
            found.append(used)
    return found


@pytest.mark.redis
@pytest.mark.skipif(not GLIBC, reason="arenas are glibc's")
def test_the_supervisors_threads_have_no_arenas_of_their_own(make_node: Callable[..., Node]) -> None:
    node = make_node()
    assert arenas(node.pid) == []


HOLES = """
from pathlib import Path
from flowmesh.processes import linux

def own_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:"))

linux.limit_malloc()
blocks = [bytearray(b"x" * 16_000) for _ in range(4_000)]
full = own_kib()
del blocks[:], blocks
print(full - own_kib())
blocks = [bytearray(b"x" * 16_000) for _ in range(4_000)]
few = blocks[::100]
del blocks
full = own_kib()
linux.trim_malloc()
print(full - own_kib())
"""


@pytest.mark.skipif(not GLIBC, reason="malloc_trim is glibc's")
def test_memory_that_is_free_between_blocks_in_use_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], cwd=ROOT, capture_output=True, text=True, check=True)
    at_the_end, between = map(int, done.stdout.split())
    assert at_the_end > 50_000, "of 62,500 KiB"
    assert between > 40_000
