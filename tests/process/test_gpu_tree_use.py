"""CPU time and memory of a real process tree, read from /proc."""

from __future__ import annotations

import subprocess
import sys

from flowmesh.execution.gpu import process_usage
from flowmesh.execution.gpu.process_usage import TreeUse
from tests.kit.support import until

PARENT = """
import subprocess, sys
burn = "import time\\nend = time.process_time() + 0.3\\nwhile time.process_time() < end: pass\\nprint(1, flush=True)\\n"
subprocess.run([sys.executable, "-c", burn], check=True)  # waited for: its seconds become ours
hold = "import sys; x = b'x' * (80 << 20); print(2, flush=True); sys.stdin.read()"
child = subprocess.Popen([sys.executable, "-c", burn + hold])
child.wait()
"""


def test_live_processes_and_those_they_waited_for_are_counted_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(3)] == ["1", "1", "2"]
        use = process_usage.look(process.pid, None)
        assert use.cpu_s is not None
        assert use.peak_rss_bytes is not None
        assert 0.55 < use.cpu_s < 5
        assert use.peak_rss_bytes > 80 << 20
    finally:
        process.communicate("")
    gone = process_usage.look(process.pid, None)
    assert (gone.cpu_s, gone.peak_rss_bytes) == (None, None)
    assert use.most(gone) == use


def test_the_most_of_two_looks() -> None:
    one, other = TreeUse(cpu_s=1.0, read_bytes=5), TreeUse(cpu_s=0.5, peak_rss_bytes=7, read_bytes=6)
    assert one.most(other) == TreeUse(cpu_s=1.0, peak_rss_bytes=7, read_bytes=6)


def test_a_cgroups_own_count_is_taken_where_it_is_more(tmp_path) -> None:
    (tmp_path / "cpu.stat").write_text("usage_usec 9000000000\nuser_usec 1\n")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        until(lambda: process_usage.look(process.pid, None).cpu_s is not None, "the process is running")
        assert process_usage.look(process.pid, str(tmp_path)).cpu_s == 9000.0
    finally:
        process.communicate(b"\n")
