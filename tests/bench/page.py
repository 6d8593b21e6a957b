"""What the page costs the supervisor: it is open, and /metrics is scraped once a second. No task runs meanwhile."""

from __future__ import annotations

import http.client
import socket
import threading
import time

from tests.bench.measure import Row, cpu_s, deployment, pss_bytes
from tests.kit.support import until


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    seconds = 10 if quick else 30
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    config = f'[web]\nlisten = "127.0.0.1:{port}"\n'
    with deployment("--log-level", "WARNING", env={"HEARTBEAT_INTERVAL_SEC": "30"}, config=config) as (node, _):
        until(lambda: (node.ask(op="status")["page"] or {}).get("state") == "listening", "the page is served")
        time.sleep(2)
        alone, pss_alone = _share(node.pid, seconds), pss_bytes(node.pid)
        done = threading.Event()
        looking = threading.Thread(target=_look, args=(port, done))
        looking.start()
        try:
            time.sleep(2)
            watched, pss = _share(node.pid, seconds), pss_bytes(node.pid)
        finally:
            done.set()
            looking.join()
    return [
        Row(
            "supervisor with its page open and /metrics scraped each second, added share of a core",
            f"{(watched - alone) * 100:.2f} %",
            f"{alone * 100:.2f} % without",
            "under 0.5 %",
            number=watched - alone,
        ),
        Row("the same, PSS", f"{pss / 1e6:.1f} MB", f"{pss_alone / 1e6:.1f} MB without", "unchanged", number=pss),
    ]


def _look(port: int, done: threading.Event) -> None:
    while not done.wait(1.0):
        for path in ("/", "/metrics"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", path)
            connection.getresponse().read()
            connection.close()


def _share(pid: int, seconds: float) -> float:
    before = cpu_s(pid)
    time.sleep(seconds)
    return (cpu_s(pid) - before) / seconds
