"""The writer of the node's log: it never waits, drops what a reader does not take, and tells of it."""

from __future__ import annotations

import fcntl
import os

from flowmesh.startup.log_writer import LogWriter


def test_a_full_pipe_drops_lines_and_tells_of_them() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    log = LogWriter(writer, most_bytes=10_000)
    line = "x" * 99 + "\n"
    for _ in range(1000):
        log.write(line)
    assert log.dropped >= 800
    assert not log.drain(0.05)
    assert os.get_blocking(writer)  # as it was: it belongs to others, too
    text = b""
    while b"were dropped" not in text:
        text += os.read(reader, 65536)
    assert log.drain(30)
    os.close(reader)
    assert f"{log.dropped} lines of this log were dropped" in text.decode()
    assert text.decode().count(line) == 1000 - log.dropped


def test_a_reader_that_is_gone_and_odd_text_do_not_raise() -> None:
    reader, writer = os.pipe()
    log = LogWriter(writer)
    log.write("half \ud800\n")
    assert log.drain(30)
    assert os.read(reader, 100) == b"half \\ud800\n"
    os.close(reader)
    log.write("nobody\n")
    assert log.drain(30)
    assert log.dropped == 1
