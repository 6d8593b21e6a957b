"""Archive and upload of a model that does not compress, beside `tar | pigz -6` and a bare copy through a socket."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from flowmesh.messages.job import OUTCOME_FILE, ArchiveRequest, Outcome
from flowmesh.messages.output import HttpDestination
from flowmesh.results.compress import library_name
from flowmesh.results.delivery import read_report, write_job
from flowmesh.results.job import DeliveryJob, Target
from flowmesh.settings.schema import ArchiveSettings
from tests.bench.measure import Row, ms, timed
from tests.kit.support import ROOT, end_process

BLOCK = 16 << 20
TAR = "tar -c final_model | pigz -6 > /dev/null"
NICE = 5
"""As deliveries are: otherwise what else this machine does would count against one of the two only."""
SINK = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
buffer = bytearray(1 << 20)
def drop(lines, left):
    while left:
        left -= lines.readinto(memoryview(buffer)[:min(left, len(buffer))])
while True:
    peer, _ = listener.accept()
    with peer, peer.makefile("rb") as lines:
        while line := lines.readline():
            left, chunked = int(line) if line[:1].isdigit() else 0, False
            while line not in (b"\\r\\n", b"\\n") and not line[:1].isdigit():
                line = lines.readline()
                if line.lower().startswith(b"content-length:"):
                    left = int(line.split(b":")[1])
                chunked |= line.lower().startswith(b"transfer-encoding: chunked")
            drop(lines, left)
            while chunked and (size := int(lines.readline(), 16)):
                drop(lines, size)
                lines.readline()
            if chunked:
                lines.readline()
            peer.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}")
"""
"""Reads and drops: HTTP requests, or after a line with a number so many bytes. Answers each in the same way."""
DELIVER = """
import sys
from pathlib import Path
from flowmesh.results.delivery import main
code = main(None, Path(sys.argv[1]))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    size = (256 << 20) if quick else (2 << 30)
    folder = Path(tempfile.mkdtemp(prefix="fm-bench-"))
    try:
        with _sink() as port:
            return list(_rows(folder, size, port))
    finally:
        shutil.rmtree(folder)


def _rows(folder: Path, size: int, port: int) -> Iterator[Row]:
    model = folder / "out" / "final_model"
    model.mkdir(parents=True)
    _fill(model / "weights.bin", size)
    shown = f"{size >> 20} MiB"
    tar = timed(lambda: subprocess.run(f"nice -n {NICE} sh -c '{TAR}'", shell=True, check=True, cwd=model.parent))
    copy = timed(lambda: _copy(model / "weights.bin", port))
    slower = max(tar, copy)
    yield Row(f"`tar | pigz -6` of {shown} to /dev/null", ms(tar), number=tar)
    yield Row(f"a bare copy of {shown} through a socket", ms(copy), number=copy)
    for name, settings in (
        ("pigz", ArchiveSettings()),
        (library_name(), ArchiveSettings(use_pigz=False)),
    ):
        seconds, peak_bytes = _deliver(folder, settings, port)
        against = f"{seconds / slower:.2f} × the slower of these two ({ms(slower)})"
        aim = "at most 1.1 ×, under 100 MB" if name == "pigz" else "under 100 MB"
        value = f"{ms(seconds)}, peak {peak_bytes / 1e6:.0f} MB"
        yield Row(f"archive with {name} and upload of {shown}", value, against, aim, seconds)


def _fill(path: Path, size: int) -> None:
    """Random enough: no compressor here looks back as far as the block repeats."""
    block = os.urandom(BLOCK)
    with path.open("wb") as file:
        for _ in range(size // BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _copy(path: Path, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as peer, path.open("rb") as file:
        peer.sendall(b"%d\n" % path.stat().st_size)
        peer.sendfile(file)
        while not peer.recv(1000).endswith(b"{}"):
            pass


def _deliver(folder: Path, settings: ArchiveSettings, port: int) -> tuple[float, int]:
    """Seconds, and the most that the delivery's process had in memory."""
    spool = folder / "spool"
    spool.mkdir()
    target = Target(
        task_id="bench",
        out_dir=str(folder / "out"),
        destination=HttpDestination(url=f"http://127.0.0.1:{port}/r"),
    )
    write_job(DeliveryJob(attempt=1, worker_id="bench", task=target, archive=settings), spool)
    outcome = Outcome(attempt=1, ok=True, result={"ok": True}, archives=(ArchiveRequest(folder="final_model"),))
    (spool / OUTCOME_FILE).write_bytes(msgspec.json.encode(outcome))
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", DELIVER, str(spool)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    seconds = time.perf_counter() - began
    report = read_report(spool)
    if done.returncode != 0 or report is None or not report.ok:
        raise RuntimeError(f"the delivery failed: {report or done.stderr}")
    shutil.rmtree(spool)
    (folder / "out" / "final_model.tar.gz").unlink()
    return seconds, int(done.stdout) * 1024


@contextlib.contextmanager
def _sink() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", SINK], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        end_process(process)
