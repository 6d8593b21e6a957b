"""A clock that a test can set by hours, for the processes of one node and for nobody else on the machine."""

from __future__ import annotations

import atexit
import functools
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

PASS_ENV = ("LD_PRELOAD", "FLOWMESH_TEST_CLOCK")
"""What `tasks.pass_env` has to hold, so that fork servers and tasks have the same clock as their supervisor."""
_OFFSET = struct.Struct("<q")


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


@functools.cache
def library() -> Path:
    """The shim, compiled once a test run."""
    program = compiler()
    assert program is not None, "the caller has looked whether there is one"
    folder = Path(tempfile.mkdtemp(prefix="flowmesh-clock-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder) if os.getpid() == owner else None)
    out = folder / "clock.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([program, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", out, source], check=True)
    return out


class Clock:
    """Of the processes that are started with `env`; its offset lies in a file at `path`."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(_OFFSET.pack(0))
        with path.open("r+b") as file:
            self._offset = mmap.mmap(file.fileno(), _OFFSET.size)
        self.env = {"LD_PRELOAD": str(library()), "FLOWMESH_TEST_CLOCK": str(path)}

    @property
    def offset_s(self) -> int:
        return int(_OFFSET.unpack(self._offset[:])[0])

    def set(self, offset_s: float) -> None:
        """From now on it is so many seconds ahead of the machine's."""
        self._offset[:] = _OFFSET.pack(int(offset_s))
