"""Runs tar and pigz: a bare environment, the exit status checked, no process left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from flowmesh.errors import DeliveryError

_STDERR_READ = 2000
_STDERR_SHOWN = 200


def tool_env() -> dict[str, str]:
    """PATH and a fixed locale: no PIGZ or TAR_OPTIONS that change what the program does, and no secret."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


@contextlib.contextmanager
def running(
    command: list[str], *, stdin: IO[bytes] | int, cwd: Path | None = None, subject: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `command`; the caller reads its stdout to the end inside the block.

    The process has ended when the block is left: it is killed where it still runs.

    Args:
        stdin: an open file, or `subprocess.PIPE`, which the caller closes.
        subject: what the program works on, for the error text.

    Raises:
        DeliveryError: its exit status is not 0. The text ends with what it wrote to stderr.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=cwd, stdin=stdin, stdout=subprocess.PIPE, stderr=errors, env=tool_env())
        assert process.stdout is not None
        try:
            yield process
            process.stdout.close()
            if process.wait() != 0:
                errors.seek(0)
                stderr = " ".join(errors.read(_STDERR_READ).decode("utf-8", "replace").split())[:_STDERR_SHOWN]
                on = f" on {subject}" if subject else ""
                raise DeliveryError(f"{command[0]} failed with exit status {process.returncode}{on}: {stderr}")
        finally:
            process.stdout.close()
            if process.poll() is None:
                process.kill()
            process.wait()
