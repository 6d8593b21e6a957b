"""gzip on all cores, as an iterator over compressed chunks: pigz where it is there and wanted, else our own.

Our own cuts the stream into blocks that are compressed side by side, each with the end of the one before as its
dictionary, as pigz does; ISA-L (the extra `archive`) does the work where it is installed, else zlib. Why ISA-L: a core
packs so much of normally distributed bfloat16 weights, and of random bytes (blocks of 1 MiB, by CPU time):

    zlib 6           9 MB/s to 0.795     32 MB/s
    zlib-ng 6       29 MB/s to 0.781     35 MB/s
    ISA-L 2        172 MB/s to 0.779    450 MB/s    what level 6 becomes
"""

from __future__ import annotations

import importlib
import os
import shutil
import struct
import subprocess
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any

from flowmesh.errors import DeliveryError
from flowmesh.settings_schema import ArchiveSettings

CHUNK_BYTES = 1 << 20
_MOST_THREADS = 24
"""Of our own: each holds a block and what became of it, and one checksum of all would not keep up with more."""
_WINDOW = 32 * 1024
_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"  # deflate, no name, no time, unknown system
_TOOL_ENV = {"PATH": os.defpath, "LC_ALL": "C"}  # neither PIGZ nor TAR_OPTIONS nor a secret of ours


def tool_env() -> dict[str, str]:
    """The environment of the programs that we start."""
    return {**_TOOL_ENV, "PATH": os.environ.get("PATH", os.defpath)}


def thread_count(settings: ArchiveSettings) -> int:
    return settings.pigz_threads or len(os.sched_getaffinity(0))


def find_pigz(settings: ArchiveSettings) -> tuple[str | None, str]:
    """The pigz to use and, where it is wanted and missing, a word about that."""
    if not settings.use_pigz:
        return None, ""
    found = shutil.which(settings.pigz_bin)
    if found is None:
        return None, f"{settings.pigz_bin} is not installed (archive.pigz_bin): compressed with {library_name()}"
    return found, ""


def library_name() -> str:
    return "ISA-L" if _isal() is not None else "zlib"


def gzipped(chunks: Iterable[bytes] | IO[bytes], settings: ArchiveSettings, pigz: str | None) -> Iterator[bytes]:
    """`chunks`, or what can be read from a pipe, compressed. Reproducible: the same input and settings, the same bytes.

    Raises:
        DeliveryError: pigz did not do it.
    """
    if pigz is not None:
        return _through_pigz(chunks, settings, pigz)
    threads = min(thread_count(settings), _MOST_THREADS)
    return _blocks(_reads(chunks), settings.compression_level, threads)


# ---- pigz ------------------------------------------------------------------------------------------------------------


def _through_pigz(chunks: Iterable[bytes] | IO[bytes], settings: ArchiveSettings, pigz: str) -> Iterator[bytes]:
    command = [pigz, f"-{settings.compression_level}", "-n", "-T", "-c", "-p", str(thread_count(settings))]
    piped = hasattr(chunks, "fileno")
    process = subprocess.Popen(
        command,
        stdin=chunks if piped else subprocess.PIPE,  # type: ignore[arg-type]
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=tool_env(),
    )
    assert process.stdout is not None
    feeder = None if piped else _Feeder(chunks, process)
    try:
        while data := process.stdout.read(CHUNK_BYTES):
            yield data
        _, said = process.communicate()
        if feeder is not None:
            feeder.finish()
        if process.returncode != 0:
            line = " ".join(said.decode("utf-8", "replace").split())[-200:]
            raise DeliveryError(f"{pigz} ended with status {process.returncode}: {line}")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        if feeder is not None:
            feeder.join()


class _Feeder(threading.Thread):
    """Writes chunks to a process's stdin, and keeps what went wrong for the reader's thread."""

    def __init__(self, chunks: Iterable[bytes], process: subprocess.Popen[bytes]) -> None:
        super().__init__(name="feed-pigz", daemon=True)
        self._chunks = chunks
        self._stdin = process.stdin
        process.stdin = None  # communicate() must leave it to us
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        assert self._stdin is not None
        try:
            for chunk in self._chunks:
                self._stdin.write(chunk)
        except BrokenPipeError:
            pass  # it ended early; its exit status says why
        except BaseException as error:  # noqa: BLE001 - raised again by finish(), on the reader's thread
            self._error = error
        finally:
            with suppress(BrokenPipeError):
                self._stdin.close()

    def finish(self) -> None:
        self.join()
        if self._error is not None:
            raise self._error


# ---- in this process -------------------------------------------------------------------------------------------------


def _isal() -> Any:
    try:
        return importlib.import_module("isal.isal_zlib")
    except ImportError:
        return None


def _blocks(chunks: Iterable[bytes], level: int, threads: int) -> Iterator[bytes]:
    library: Any = _isal() if level > 0 else None  # ISA-L's level 0 is not "stored", as gzip's is
    if library is not None:
        level = (level + 2) // 3  # its levels end at 3
    else:
        library = zlib
    checksum, size, window = 0, 0, b""
    yield _HEADER
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="gzip") as pool:
        for block in _of_size(chunks, CHUNK_BYTES):
            waiting.append(pool.submit(_deflate, library, level, block, window))
            checksum, size, window = library.crc32(block, checksum), size + len(block), block[-_WINDOW:]
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    # an empty last block, then the trailer
    yield b"\x03\x00" + struct.pack("<II", checksum, size & 0xFFFFFFFF)


def _deflate(library: Any, level: int, block: bytes, window: bytes) -> bytes:
    """One block of a raw deflate stream, ended on a byte's border so that the next one can follow."""
    arguments = (level, library.DEFLATED, -zlib.MAX_WBITS, 8, 0)
    stream = library.compressobj(*arguments, window) if window else library.compressobj(*arguments)
    data: bytes = stream.compress(block) + stream.flush(zlib.Z_SYNC_FLUSH)
    return data


def _reads(source: Iterable[bytes] | IO[bytes]) -> Iterator[bytes]:
    read = getattr(source, "read", None)
    return iter(lambda: read(CHUNK_BYTES), b"") if read is not None else iter(source)


def _of_size(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in blocks of `size`."""
    held = bytearray()
    for chunk in chunks:
        if not held and len(chunk) == size:
            yield chunk
            continue
        held += chunk
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)
