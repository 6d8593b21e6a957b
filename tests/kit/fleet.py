"""Several nodes on one Redis, with a client of the queue and a peer that hears all events."""

from __future__ import annotations

from collections.abc import Mapping

from flowmesh.client import Client, TaskState
from tests.kit.support import Node, Orchestrator, RedisServer, until

CONFIG = """
[queue]
take_over_after_s = 0.4

[redis]
timeout_s = 1.0

[tasks]
cancel_grace_s = 1.0
term_grace_s = 0.5
"""
"""Times that let tests see the end of a grace or of a node. A test's own settings follow it, first those of [tasks]."""


class Fleet:
    """A Redis that keeps its data, and nodes `w1`, `w2`, … with one slot each.

    Args:
        nodes: how many.
        config: of each.
        env: additional variables of each.
    """

    def __init__(self, nodes: int, config: str, env: Mapping[str, str] | None = None) -> None:
        self.server = RedisServer(keep=True)
        self.nodes = [
            Node(self.server, worker_id=f"w{number + 1}", config=config, env=dict(env or {})) for number in range(nodes)
        ]
        for node in self.nodes:
            node.start(wait=False)
        for node in self.nodes:
            node.wait_status("IDLE")
        self.peer = Orchestrator(self.server)
        self.client = Client(self.server.url)

    def close(self) -> None:
        self.client.close()
        for node in self.nodes:
            node.close()
        self.server.close()

    def node(self, worker_id: str) -> Node:
        return next(node for node in self.nodes if node.worker_id == worker_id)

    def wait_state(self, task_id: str, state: str) -> TaskState:
        """Wait until a task is in a state; returns what the client says of it then."""

        def there() -> TaskState | None:
            found = self.client.state(task_id)
            return found if found is not None and found.state == state else None

        return until(there, f"{task_id} is {state}")

    def wait_idle(self) -> None:
        """Wait until all nodes are idle and have no task."""
        for node in self.nodes:
            node.wait_status("IDLE")
            until(lambda node=node: node.ask(op="status")["tasks"] == [], "no task is left")

    def show(self) -> None:
        """Print the end of each node's output: for a test that failed."""
        for node in self.nodes:
            print(f"--- {node.worker_id}\n{node.text()[-6000:]}")
