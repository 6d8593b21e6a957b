"""Kills of the process that serves the page, while tasks run: it comes back, and no task notices."""

from __future__ import annotations

import contextlib
import http.client
import random
import signal
import socket

from tests.faults.rig import Lost, Rig
from tests.faults.table import fault, until
from tests.kit.support import Node, Orchestrator, with_mark


@fault("page: SIGKILL of its process, again and again")
def _(rig: Rig, rng: random.Random) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    node = Node(rig.server, worker_id="paged", config=f'[web]\nlisten = "127.0.0.1:{port}"\n')
    peer = Orchestrator(rig.server)
    with contextlib.closing(node), contextlib.closing(peer):
        node.start()
        for _ in range(rng.randint(1, 3)):
            until(lambda: _status(port) == 200, "the page answers")
            task_id = peer.dispatch("paged", {"taskType": "echo", "delaySec": rng.random() / 2})
            rig.pause(rng)
            for pid in with_mark(str(node.home)):
                if _serves(pid, port):
                    rig.hit(pid, signal.SIGKILL)
            if peer.wait_end(task_id)["type"] != "TASK_SUCCEEDED":
                raise Lost(f"{task_id} did not succeed")
        until(lambda: _status(port) == 200, "the page answers again")


def _status(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def _serves(pid: int, port: int) -> bool:
    import psutil

    try:
        return any(each.laddr.port == port for each in psutil.Process(pid).net_connections("tcp") if each.laddr)
    except psutil.Error:
        return False
