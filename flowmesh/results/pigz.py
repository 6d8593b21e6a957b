"""pigz: gzip on several cores, as a program."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Protocol

from flowmesh.results.programs import running
from flowmesh.settings.schema import ArchiveSettings

READ_BYTES = 1 << 20


class Sink(Protocol):
    """Where compressed bytes go."""

    def write(self, data: bytes, /) -> int: ...

    def flush(self) -> None: ...


def find_pigz(settings: ArchiveSettings) -> str | None:
    """The path of pigz; None where it is not installed or `archive.use_pigz` is false."""
    return shutil.which(settings.pigz_bin) if settings.use_pigz else None


def compress_with_pigz(source: Iterable[bytes] | IO[bytes], sink: Sink, pigz: str, *, level: int, threads: int) -> None:
    """Compress `source` into `sink`. A pipe becomes pigz's stdin; anything else is copied there by a thread.

    Raises:
        DeliveryError: pigz failed. Errors of `source` and `sink` are raised as they are.
    """
    command = [pigz, f"-{level}", "-n", "-T", "-c", "-p", str(threads)]
    is_pipe = hasattr(source, "fileno")
    # The pool is the outer block: pigz has ended before the feeding thread is joined, so that thread cannot block.
    with (
        ThreadPoolExecutor(1, thread_name_prefix="feed-pigz") as pool,
        running(command, stdin=source if is_pipe else subprocess.PIPE) as process,  # type: ignore[arg-type]
    ):
        feeding = None if process.stdin is None else pool.submit(_feed, source, process.stdin)
        assert process.stdout is not None
        while data := process.stdout.read(READ_BYTES):
            sink.write(data)
        if feeding is not None:
            feeding.result()


def _feed(source: Iterable[bytes], stdin: IO[bytes]) -> None:
    try:
        for chunk in source:
            stdin.write(chunk)
    except BrokenPipeError:
        pass  # pigz ended early; its exit status says why
    finally:
        with suppress(BrokenPipeError):
            stdin.close()
