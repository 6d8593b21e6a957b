"""A node with much to see in `flowmesh top`: stub GPUs, tasks of several kinds, a queue, deliveries, verdicts.

As a program it draws the picture of the README: `python -m tests.kit.top_scene docs/images/top.svg`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.kit.gpu_node import GIB, MIB, GpuNode
from tests.kit.http_server import Answer, Server
from tests.kit.support import Orchestrator, RedisServer, until

TYPES = ("sft", "dpo", "inference", "rag", "agent")
CONFIG = "[node]\nslots = 'per-gpu'\ncost_per_hour = 24.0\n" + "".join(
    f'[task_types.{name}]\nrunner = "tests.kit.top_runners:ShownRunner"\nenvironment = "bare"\n' for name in TYPES
)
SHOWN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("sft-llama-8b-1127", "sft", {"total": 1200, "done": 804, "loss": [2.31, 0.62]}),
    ("dpo-qwen-7b-0042", "dpo", {"total": 400, "done": 61, "loss": [0.69, 0.31]}),
    ("answers-batch-17", "inference",
     {"phase": "generate", "total": 5000, "done": 3120, "unit": "items", "tokens_per_s": 8120.0}),
    ("index-handbook", "rag", {"phase": "embed", "total": 900, "done": 450, "unit": "documents"}),
    ("triage-tickets-with-a-long-name-that-says-all-0007", "agent", {"phase": "act", "done": 12, "unit": "steps"}),
)  # fmt: skip
HOSTILE = "no rows [bold]left[/bold] in \x1b[31mdata\x1b[0m of shard 3"
UTILIZATION = (97, 94, 88, 61, 12, 0, 0, 0)


def uuid_of(number: int) -> str:
    return f"GPU-{number:08d}-0000-0000-0000-000000000000"


def script(count: int) -> str:
    """The stub's GPUs: the first ones busy."""
    lines = ["driver 580.65", "cuda 13000", "without energy"]
    for number in range(count):
        gpu, use = uuid_of(number), UTILIZATION[number]
        lines += [
            f"gpu {gpu} {80 * GIB} NVIDIA H100 80GB HBM3",
            f"set {gpu} used {500 * MIB if use < 20 else use * 3 // 4 * GIB}",
            f"set {gpu} util {use}",
            f"set {gpu} power {70_000 + use * 6_000}",
            f"set {gpu} temp {34 + use // 3}",
        ]
    return "\n".join(lines)


class Scene:
    def __init__(self, server: RedisServer, node: GpuNode, peer: Orchestrator, http: Server, count: int) -> None:
        self.server = server
        self.node = node
        self.peer = peer
        self.http = http
        self.workers = [f"w1-gpu{number}" for number in range(count)] if count > 1 else ["w1"]

    def start(self, worker: str, task_id: str, kind: str, shown: dict[str, Any], **spec: Any) -> str:
        """Dispatch a task."""
        return self.peer.dispatch(worker, {"taskType": kind, "shown": shown, **spec}, task_id=task_id)

    def wait_shown(self, task_id: str) -> None:
        """Wait until a task has shown what it has."""
        until((self.node.results_dir / task_id / "shown").exists, f"{task_id} runs\n{self.node.text()[-2000:]}")

    def end(self, task_id: str) -> None:
        self.wait_shown(task_id)
        self.node.let_go(task_id)

    def delivered_to(self, path: str) -> dict[str, Any]:
        return {"output": {"destination": {"type": "http", "url": f"{self.http.url}{path}", "timeoutSec": 5}}}

    def play(self, *, degraded: bool = False) -> None:
        """An end of each kind; then what runs, waits and is delivered.

        Args:
            degraded: the last GPU has a foreign process, and an error has codes for a terminal.
        """
        last = self.workers[-1]
        for task_id, more, kind in (
            ("summaries-0311", {}, "inference"),
            ("index-shard-3", {"fail": HOSTILE if degraded else "no rows left in the data of shard 3"}, "rag"),
        ):
            self.end(self.start(last, task_id, kind, more))
            self.peer.wait_end(task_id)
        self.end(self.start(last, "adapter-upload-9", "sft", {}, **self.delivered_to("/refused")))
        self.peer.wait_end("adapter-upload-9")
        self.end(self.start(last, "report-2026-11", "inference", {}, **self.delivered_to("/busy")))
        until(lambda: any(task["waits_for"] for task in self.node.ask(op="status")["tasks"]), "a delivery waits")
        for worker, (task_id, kind, shown) in zip(self.workers, SHOWN, strict=False):
            self.start(worker, task_id, kind, shown)
        for task_id, _, _ in SHOWN[: len(self.workers)]:
            self.wait_shown(task_id)
        for number in range(7):
            self.peer.dispatch(self.workers[0], {"taskType": "sft"}, task_id=f"sft-sweep-{number:02d}")
        until(lambda: self.node.ask(op="status")["queued"] == 7, "tasks wait")
        if degraded:
            self.node.stub.add(f"process {uuid_of(len(self.workers) - 1)} {os.getpid()} {9 * GIB}")
            self.node.stub.add(f"set {uuid_of(len(self.workers) - 1)} used {9 * GIB}")
            self.node.wait_word("DEGRADED", last)


@contextlib.contextmanager
def scene(count: int = 8, config: str = "") -> Iterator[Scene]:
    """A running node with `count` GPUs and nothing to do."""
    with contextlib.ExitStack() as stack:
        server = RedisServer()
        stack.callback(server.close)
        node = GpuNode(server, script(count), CONFIG + config)
        stack.callback(node.close)
        node.start(wait=False)
        first = "w1-gpu0" if count > 1 else "w1"
        node.wait_word("IDLE", first)
        peer = Orchestrator(server)
        stack.callback(peer.close)
        http = stack.enter_context(Server(Answer(403, b"quota exceeded"), *[Answer(503)] * 1000))
        yield Scene(server, node, peer, http, count)


def draw(target: Path, columns: int = 118, rows: int = 48) -> None:
    """The view of a busy node as an SVG, without the web fonts that rich names in it."""
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console

    from flowmesh.cli.top import frame
    from flowmesh.cli.top.node_source import NodeSource

    with scene(4) as found:
        found.play()
        time.sleep(3)  # for some energy
        picture = NodeSource(found.node.state_dir).fetch()
    head = frame.header(picture, columns)
    lines = [*head, *frame.body(picture, columns, rows - len(head), picture.running[0].task_id)]
    console = Console(record=True, width=columns, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    for line in lines:
        console.print(line, soft_wrap=True)
    plain_fonts = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    target.parent.mkdir(exist_ok=True)
    svg = console.export_svg(title="flowmesh top", code_format=plain_fonts, unique_id="top")
    target.write_text(_TEXT.sub(_without_margins, svg))


_TEXT = re.compile(
    r'x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"( [^>]*)>((?:&#160;)*)((?:(?!</text>).)*?)((?:&#160;)*)</text>'
)
_CELL = 12.2
"""Width of a character in rich's SVG."""


def _without_margins(found: re.Match[str]) -> str:
    """A text without the spaces around it: some programs that show SVG leave them out, and shift the rest."""
    x, y, length, attributes, before, text, after = found.groups()
    left, right = before.count("&#160;") * _CELL, after.count("&#160;") * _CELL
    place = f'x="{float(x) + left:g}" y="{y}" textLength="{max(0.0, float(length) - left - right):g}"'
    return f"{place}{attributes}>{text}</text>"


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
