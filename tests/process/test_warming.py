"""Libraries are imported before a task needs them: which, in what order, within which bounds, and never in the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from flowmesh.execution.launch import warming
from flowmesh.processes import linux
from flowmesh.processes.server_client import Environment
from flowmesh.processes.server_pool import ServerPool
from flowmesh.settings.schema import EnvironmentSettings, Settings
from flowmesh.startup import environments
from flowmesh.tasks.catalogue import Catalogue
from flowmesh.tasks.journal import Journal
from tests.kit.paths import ROOT
from tests.kit.support import Node, Orchestrator, until

pytestmark = pytest.mark.redis

WARM = "--set=processes.warm_max_mb=10000"
HOLD = """
import os, time
while not os.path.exists({gate!r}):
    time.sleep(0.02)
"""


def config(**warm: str) -> str:
    """Environments with these values of `warm`, each with a task type of its name."""
    return '[environments.default]\nwarm = "on first use"\n' + "".join(
        f"[environments.{name}]\nwarm = {value}\n"
        f'[task_types.{name}]\nrunner = "runners.echo:EchoRunner"\nenvironment = "{name}"\n'
        for name, value in warm.items()
    )


def ready(node: Node) -> list[str]:
    """The environments whose servers have become ready, in order, but for `light`."""
    return [name for name in re.findall(r"fork server ready server=(\w+)-", node.text()) if name != "light"]


def order(node: Node) -> list[str]:
    with contextlib.closing(sqlite3.connect(node.state_dir / "journal.sqlite")) as db:
        rows = db.execute("SELECT value FROM facts WHERE name = 'environments'").fetchall()
    return json.loads(rows[0][0])["order"] if rows else []


def test_environments_in_the_order_of_last_use(orchestrator: Orchestrator, make_node: Callable[..., Node]) -> None:
    node = make_node(WARM, config=config(a="true", b="true", c='"on first use"'))
    until(lambda: ready(node) == ["a", "b"], "both are imported", 20.0)
    assert orchestrator.run("w1", {"taskType": "b"})["type"] == "TASK_SUCCEEDED"
    assert ready(node) == ["a", "b"], "the task found its libraries there"
    assert orchestrator.run("w1", {"taskType": "c"})["type"] == "TASK_SUCCEEDED"
    until(lambda: order(node) == ["c", "b"], "the order is written down")
    node.stop()
    node.start()
    until(lambda: ready(node) == ["a", "b", "c", "b", "a"], "again, the one that was used last first", 20.0)


def test_a_task_that_comes_meanwhile(
    orchestrator: Orchestrator, make_node: Callable[..., Node], tmp_path: Path
) -> None:
    """It waits for the imports that have begun, which then get the CPU as all else does."""
    gate = tmp_path / "gate"
    (tmp_path / "slow_to_import.py").write_text(HOLD.format(gate=str(gate)))
    slow = config(a="true").replace("warm = true", 'warm = true\npreload = ["slow_to_import"]')
    node = make_node(WARM, config=slow, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    server = until(lambda: next((s for s in node.ask(op="status")["servers"] if s["environment"] == "a"), None), "it")
    own = os.getpriority(os.PRIO_PROCESS, node.pid)
    nice = min(own + warming.NICE, 19) if linux.may_raise_priority() else own
    until(lambda: os.getpriority(os.PRIO_PROCESS, server["pid"]) == nice, "its imports are nice")
    other = orchestrator.run("w1", {"taskType": "echo"})
    assert other["type"] == "TASK_SUCCEEDED", "tasks of other environments do not wait"
    task = orchestrator.dispatch("w1", {"taskType": "a"})
    until(lambda: os.getpriority(os.PRIO_PROCESS, server["pid"]) == own, "a task waits for it")
    gate.touch()
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"


def test_a_broken_environment_is_found_before_a_task_is(
    orchestrator: Orchestrator, make_node: Callable[..., Node]
) -> None:
    broken = config(a="true", b="true").replace("warm = true", 'warm = true\npreload = ["is_not_there"]', 1)
    node = make_node(WARM, config=broken)
    until(lambda: ready(node) == ["b"], "the other one is imported", 20.0)
    (fault,) = node.ask(op="status")["faults"]
    assert fault["name"] == "environment a"
    assert "is_not_there" in fault["reason"]
    env = orchestrator.redis.hget("worker:w1", "env_json") or b""
    assert b'"b"' in env
    assert b'"a"' not in env


def test_memory_is_bounded(make_node: Callable[..., Node]) -> None:
    node = make_node("--set=processes.warm_max_mb=1", config=config(a="true"))
    until(lambda: "does not fit into processes.warm_max_mb = 1" in node.text(), "it says so", 20.0)
    assert ready(node) == []


def test_servers_that_nobody_uses_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "KEEP_S", 0.3)
    monkeypatch.setattr(warming, "LOOK_S", 0.05)
    monkeypatch.setattr(warming, "QUIET_S", 0.0)
    types = {name: environments.task_types(Settings())["echo"] for name in ("a", "b")}
    offered = {name: type(each)(name=name, runner=each.runner, environment=name) for name, each in types.items()}

    async def live() -> None:
        wanted = True
        pool = ServerPool(
            {name: Environment(name=name, python=sys.executable) for name in offered},
            folder=tmp_path / "run", log_folder=tmp_path / "log", env={**os.environ, "PYTHONPATH": str(ROOT)},
            adoption_timeout_s=5.0, cgroup=None, mark="test",
        )  # fmt: skip
        with contextlib.closing(Journal(tmp_path / "journal.sqlite")) as journal:
            room = warming.Warming(
                pool=pool, catalogue=Catalogue(offered=offered, missing={}), broken=set, report=pytest.fail,
                journal=journal, settings={"b": EnvironmentSettings(warm=False)}, max_mb=10000,
                idle=lambda: True, wanted=lambda: wanted,
            )  # fmt: skip
            running = asyncio.create_task(room.run())
            await pool.warm("b")
            pool.used_at["b"] = time.monotonic()  # as its first task would
            await soon(lambda: pool.is_ready("a"))
            await soon(lambda: not pool.has_server("b"))
            assert pool.is_ready("a")
            wanted = False
            await soon(lambda: not pool.has_server("a"))
            wanted = True
            await soon(lambda: pool.is_ready("a"))
            running.cancel()
        await pool.close()

    asyncio.run(live())


def soon(condition: Callable[[], bool]) -> Awaitable[None]:
    async def wait() -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.02)

    return wait()


def test_the_node_has_imported_what_it_checks_documents_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "LOOK_S", 0.05)
    monkeypatch.setattr(warming, "QUIET_S", 0.0)
    monkeypatch.delitem(sys.modules, "runners.remote.task", raising=False)
    kind = msgspec.structs.replace(environments.task_types(Settings())["api"], environment="a")

    async def live() -> None:
        pool = ServerPool(
            {"a": Environment(name="a", python=sys.executable)},
            folder=tmp_path / "run", log_folder=tmp_path / "log", env={**os.environ, "PYTHONPATH": str(ROOT)},
            adoption_timeout_s=5.0, cgroup=None, mark="test",
        )  # fmt: skip
        with contextlib.closing(Journal(tmp_path / "journal.sqlite")) as journal:
            room = warming.Warming(
                pool=pool, catalogue=Catalogue(offered={"api": kind}, missing={}), broken=set, report=pytest.fail,
                journal=journal, settings={}, max_mb=10000, idle=lambda: True, wanted=lambda: True,
            )  # fmt: skip
            running = asyncio.create_task(room.run())
            await soon(lambda: pool.is_ready("a"))
            await soon(lambda: "runners.remote.task" in sys.modules)
            running.cancel()
        await pool.close()

    asyncio.run(live())
