"""The store of a group over several nodes listens on the endpoint's address only."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from runners.training.torchrun import LAUNCHER
from tests.kit.paths import ROOT
from tests.kit.support import end_process, until

pytest.importorskip("torch", reason="needs the extra 'training'")


def listening(port: int) -> list[str]:
    """The addresses that sockets listen on at this port, in the kernel's hexadecimal form."""
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                found.append(address.partition(":")[0])
    return found


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "0100007F"), ("localhost", "0100007F")])
def test_the_rendezvous_listens_on_its_address(host: str, address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", LAUNCHER, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", "x", "--local-addr", "127.0.0.1", "-m", "this"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        until(lambda: process.poll() is not None or listening(port), "torchrun listens")
        assert set(listening(port)) <= {address, "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
        assert listening(port)
    finally:
        with contextlib.suppress(ProcessLookupError):
            end_process(process)
