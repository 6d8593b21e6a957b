"""The supervisor with nothing to do, and with messages that are not for it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from tests.bench.measure import Row, cpu_s, deployment, ms, pss_bytes, timed
from tests.kit.paths import CONF
from tests.kit.support import Node, RedisServer


def _validate(file: str) -> None:
    subprocess.run([sys.executable, "-m", "flowmesh.cli.main", "validate", file], check=True, stdout=subprocess.DEVNULL)


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    server = RedisServer()
    node = Node(server, "--log-level", "WARNING", executed=True)
    try:
        to_idle = timed(node.start)
    finally:
        node.close()
        server.close()
    seconds = 5 if quick else 20
    count = 500 if quick else 3000
    with deployment("--log-level", "WARNING", env={"HEARTBEAT_INTERVAL_SEC": "30"}) as (node, peer):
        time.sleep(2)
        before = cpu_s(node.pid)
        time.sleep(seconds)
        share = (cpu_s(node.pid) - before) / seconds
        pss = pss_bytes(node.pid)
        message = json.dumps({"task_id": "x", "assigned_worker": "w2", "task": {"spec": {"text": "y" * 100_000}}})
        before = cpu_s(node.pid)
        for n in range(count):
            peer.redis.publish("tasks", message)
            if n % 50 == 0:
                time.sleep(0.05)  # Redis cuts off a subscriber that is 32 MB behind
        time.sleep(1)
        per_message = (cpu_s(node.pid) - before) / count
    file = str(CONF / "tasks" / "sft.yaml") if (CONF / "tasks" / "sft.yaml").exists() else str(CONF / "node.toml")
    checks = [timed(lambda: _validate(file)) for _ in range(3 if quick else 10)]
    return [
        Row("`flowmesh validate` of a training task, whole process (best)", ms(min(checks)), aim="under 300 ms"),
        Row("start of the process → IDLE in Redis", ms(to_idle), number=to_idle),
        Row("supervisor at rest, PSS", f"{pss / 1e6:.1f} MB", aim="under 40 MB"),
        Row(f"supervisor at rest, share of a core over {seconds} s", f"{share * 100:.2f} %", aim="under 0.5 %"),
        Row("a 100 KB message for another worker, CPU time", f"{per_message * 1e6:.0f} µs", aim="next to nothing"),
    ]
