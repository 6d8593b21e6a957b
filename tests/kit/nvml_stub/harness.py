"""Runs a piece of test in a forked child whose NVIDIA driver library is the stub: the pytest process never loads it."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

CHILD_TIMEOUT_S = 60


class Stub:
    """The scripted hardware. Every change holds from the library's next call on."""

    def __init__(self, path: Path, script: str) -> None:
        self._path = path
        self.lines = [line.strip() for line in script.strip().splitlines()]
        self._write()

    def add(self, *lines: str) -> None:
        self.lines += lines
        self._write()

    def remove(self, *beginnings: str) -> None:
        self.lines = [line for line in self.lines if not line.startswith(beginnings)]
        self._write()

    def change(self, beginning: str, line: str) -> None:
        self.lines = [each for each in self.lines if not each.startswith(beginning)] + [line]
        self._write()

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        new.write_text("\n".join(self.lines) + "\n")
        new.replace(self._path)


@functools.cache
def library() -> Path:
    """The stub, compiled once a test run."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler for the stub of NVML")
    folder = Path(tempfile.mkdtemp(prefix="flowmesh-nvml-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    out = folder / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("stub.c")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", *warnings, "-Wl,-soname,libnvidia-ml.so.1", "-o", out, source], check=True
    )
    return out


def run_with_stub(script: str, body: Callable[[Stub], Awaitable[None]]) -> None:
    """Run `body` on a loop of its own in a child with the stub in place; what fails there fails here."""
    built = library()
    scratch = Path(tempfile.mkdtemp(prefix="flowmesh-nvml-script-"))
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_fd)
        _child(built, scratch, script, body, write_fd)
    os.close(write_fd)
    signal_before = signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.alarm(CHILD_TIMEOUT_S)
    try:
        with os.fdopen(read_fd, "rb") as pipe:
            report = pipe.read().decode()
        _, status = os.waitpid(pid, 0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal_before)
        shutil.rmtree(scratch)
    assert os.waitstatus_to_exitcode(status) == 0, f"in the child:\n{report or 'no report; it was killed or crashed'}"


def _child(
    built: Path, scratch: Path, script: str, body: Callable[[Stub], Awaitable[None]], write_fd: int
) -> None:  # does not return
    code = 1
    try:
        signal.alarm(0)
        os.environ["FLOWMESH_NVML_STUB"] = str(scratch / "script")
        stub = Stub(scratch / "script", script)
        loaded = ctypes.CDLL(str(built))  # its soname now answers dlopen("libnvidia-ml.so.1")
        import pynvml

        # On a machine with a real driver the binding may hold that one already.
        pynvml.nvmlLib = loaded
        pynvml._nvmlGetFunctionPointer_cache.clear()
        asyncio.run(body(stub))
        code = 0
    except BaseException:  # noqa: BLE001 (the parent raises it)
        os.write(write_fd, traceback.format_exc().encode())
    finally:
        os._exit(code)
