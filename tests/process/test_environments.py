"""Environments: other interpreters, preloads that fail or are not safe to fork, packages that change on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.kit.support import ROOT, Node, Orchestrator, until

pytestmark = pytest.mark.redis

RUNNER = """
import gc, os, sys, threading
from runners.api import Runner
import {module}

class Probe(Runner):
    def run(self, ctx):
        while "gate" in ctx.spec and not os.path.exists(ctx.spec["gate"]):
            ctx.sleep(0.05)
        told = {{"probed": os.environ.get("PROBED"), "prefix": sys.prefix, "collects": gc.isenabled()}}
        return {{**told, "value": {module}.VALUE, "preloaded": {module}.PID != os.getpid()}}
"""


def make_environment(folder: Path, module: str, body: str) -> Path:
    """A virtual environment with this one's packages and one module that only it has."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "shared.pth").write_text("\n".join([*ours, str(ROOT), ""]))
    (site / f"{module}.py").write_text(body)
    (site / f"{module}_runner.py").write_text(textwrap.dedent(RUNNER.format(module=module)))
    return folder / "bin" / "python"


def config(python: Path, module: str) -> str:
    return f"""
[environments.other]
python = "{python}"
preload = ["{module}"]
[task_types.probe]
runner = "{module}_runner:Probe"
environment = "other"
"""


SHORT_WAIT = "[tasks]\nnode_fault_wait_s = 0.2\n"
BODY = "import os\nVALUE = 1\nPID = os.getpid()\n"


def test_another_interpreter_runs_its_tasks_with_its_own_packages(
    orchestrator: Orchestrator, make_node, tmp_path: Path
) -> None:
    python = make_environment(tmp_path / "venv", "only_there", BODY)
    node: Node = make_node(config=config(python, "only_there"))
    assert orchestrator.run("w1", {"taskType": "probe"}, task_id="p")["type"] == "TASK_SUCCEEDED"
    result = node.result("p")
    assert result["prefix"] == str(tmp_path / "venv")
    assert result["value"] == 1
    assert result["preloaded"] is True


def test_garbage_is_looked_for_in_a_task_and_not_while_libraries_are_imported(
    orchestrator: Orchestrator, make_node, tmp_path: Path
) -> None:
    body = BODY.replace("VALUE = 1", "import gc\nVALUE = gc.isenabled()")
    node: Node = make_node(config=config(make_environment(tmp_path / "venv", "only_there", body), "only_there"))
    assert orchestrator.run("w1", {"taskType": "probe"}, task_id="p")["type"] == "TASK_SUCCEEDED"
    assert (node.result("p")["value"], node.result("p")["collects"]) == (False, True)


def test_a_server_whose_packages_changed_is_replaced(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv", "only_there", BODY)
    node: Node = make_node(config=config(python, "only_there"))
    orchestrator.run("w1", {"taskType": "probe"}, task_id="before")
    module = next((tmp_path / "venv").rglob("only_there.py"))
    module.unlink()  # as pip does it: the folder's mtime changes
    module.write_text(BODY.replace("VALUE = 1", "VALUE = 22"))
    orchestrator.run("w1", {"taskType": "probe"}, task_id="after")
    assert (node.result("before")["value"], node.result("after")["value"]) == (1, 22)
    assert "its packages changed" in node.text()


def test_packages_that_changed_while_no_supervisor_lived(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    """As in an upgrade: the adopted server has imported files that have changed since."""
    python = make_environment(tmp_path / "venv", "only_there", BODY)
    node: Node = make_node(config=config(python, "only_there"))
    orchestrator.run("w1", {"taskType": "probe"}, task_id="before")
    node.kill()
    module = next((tmp_path / "venv").rglob("only_there.py"))
    module.unlink()
    module.write_text(BODY.replace("VALUE = 1", "VALUE = 22"))
    node.start()
    orchestrator.run("w1", {"taskType": "probe"}, task_id="after")
    assert (node.result("before")["value"], node.result("after")["value"]) == (1, 22)


@pytest.mark.parametrize("how", ["another interpreter", "another name", "another variable"])
def test_settings_that_changed_while_a_task_ran_are_the_next_ones(
    orchestrator: Orchestrator, make_node, tmp_path: Path, how: str
) -> None:
    """SIGHUP: the task continues in the server that forked it; the next task gets the new settings."""
    gate = tmp_path / "gate"
    first = make_environment(tmp_path / "first", "only_there", BODY)
    second = make_environment(tmp_path / "second", "only_there", BODY)
    node: Node = make_node(config=config(first, "only_there"), env={"PROBED": "yes"})
    running = orchestrator.dispatch("w1", {"taskType": "probe", "gate": str(gate)}, task_id="running")
    orchestrator.wait_started(running)
    pid = node.task_pid(running)
    changed = {
        "another interpreter": config(second, "only_there"),
        "another name": config(first, "only_there").replace("other", "elsewhere"),
        "another variable": config(first, "only_there") + '[tasks]\npass_env = ["PROBED"]\n',
    }
    (node.home / "node.toml").write_text(changed[how])
    os.kill(node.pid, signal.SIGHUP)
    until(lambda: node.text().count("subscribed") == 2, "the new supervisor is subscribed")
    assert node.task_pid(running) == pid
    gate.touch()
    assert orchestrator.wait_end(running)["type"] == "TASK_SUCCEEDED"
    assert orchestrator.run("w1", {"taskType": "probe"}, task_id="next")["type"] == "TASK_SUCCEEDED"
    assert node.result("next")["preloaded"] is True
    assert node.result("next")["prefix"] == str(tmp_path / ("second" if how == "another interpreter" else "first"))
    assert node.result("next")["probed"] == ("yes" if how == "another variable" else None)
    kept = until(lambda: len(node.servers()) == 2 and node.ask(op="status")["servers"], "the old servers are gone")
    assert sorted(each["environment"] for each in kept) == sorted(
        ["light", "elsewhere" if how == "another name" else "other"]
    )


def test_a_cancel_does_not_wait_for_the_imports(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    body = BODY + f"import pathlib, time\nwhile not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.02)\n"
    python = make_environment(tmp_path / "venv", "slow", body)
    node: Node = make_node(config=config(python, "slow"))
    for force in (False, True):
        task_id = orchestrator.dispatch("w1", {"taskType": "probe"})
        until(
            lambda: len(node.servers()) == 2 and node.ask(op="status")["tasks"], "its environment's server is importing"
        )
        assert node.ask(op="cancel", task_id=task_id, force=force)["state"] == "launching"
        end = orchestrator.wait_end(task_id)
        assert (end["payload"]["error_kind"], end["payload"]["started_at"]) == ("cancelled", None)
    after = orchestrator.dispatch("w1", {"taskType": "probe"}, task_id="after")
    gate.touch()
    assert orchestrator.wait_end(after)["type"] == "TASK_SUCCEEDED"
    assert node.result("after")["preloaded"] is True


def test_recycle_on_request_replaces_the_servers_and_keeps_their_tasks(orchestrator: Orchestrator, node: Node) -> None:
    task = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 1.5})
    orchestrator.wait_started(task)
    (before,) = node.servers()
    assert node.ask(op="recycle")["recycled"] == ["light"]
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    orchestrator.run("w1", {"taskType": "echo"})
    (after,) = until(lambda: len(node.servers()) == 1 and node.servers(), "the old server is gone")
    assert after != before
    unknown = node.ask(op="recycle", environment="defolt")
    assert unknown["ok"] is False
    assert "did you mean 'default'" in unknown["error"]


def test_no_task_is_given_to_a_server_that_is_being_retired(orchestrator: Orchestrator, node: Node) -> None:
    ids = []
    for _ in range(20):
        ids += [orchestrator.dispatch("w1", {"taskType": "echo"}) for _ in range(3)]
        orchestrator.wait_end(ids[-3])
        node.ask(op="recycle")
    assert {orchestrator.wait_end(task)["type"] for task in ids} == {"TASK_SUCCEEDED"}


def test_a_retired_server_stays_so_for_the_next_supervisor(orchestrator: Orchestrator, node: Node) -> None:
    task = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 2.0})
    orchestrator.wait_started(task)
    (before,) = node.servers()
    node.ask(op="recycle")
    node.kill()
    node.start()
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    (after,) = until(lambda: len(node.servers()) == 1 and node.servers(), "the old server is gone")
    assert after != before


def test_an_import_error_is_told_once_with_its_cause_and_others_go_on(
    orchestrator: Orchestrator, make_node, tmp_path: Path
) -> None:
    python = make_environment(tmp_path / "venv", "broken", "raise RuntimeError('libfoo.so.3 is missing')")
    node: Node = make_node(config=config(python, "broken") + SHORT_WAIT)
    for _ in range(3):
        end = orchestrator.run("w1", {"taskType": "probe"})
        assert end["payload"]["error_kind"] == "node_fault"
        assert end["payload"]["retryable"] is True
        why = "environment other: cannot import broken: RuntimeError: libfoo.so.3 is missing"
        assert end["error"] == f"not started: {why}"
    assert len([line for line in node.text().splitlines() if " ERROR " in line]) == 1
    assert "libfoo.so.3" in node.ask(op="status")["warnings"]["other"]
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


def test_a_server_that_dies_while_it_imports_is_told_with_its_last_line(
    orchestrator: Orchestrator, make_node, tmp_path: Path
) -> None:
    body = "import os, sys\nprint('no licence found', file=sys.stderr, flush=True)\nos._exit(9)\n"
    python = make_environment(tmp_path / "venv", "dies", body)
    make_node(config=config(python, "dies") + SHORT_WAIT)
    end = orchestrator.run("w1", {"taskType": "probe"})
    assert end["payload"]["error_kind"] == "node_fault"
    assert "no licence found" in end["error"]


def test_a_preload_that_leaves_a_thread_is_not_forked(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    body = BODY + (
        "import threading, time\n"
        "if os.environ.get('FLOWMESH_ATTEMPT') is None:\n"
        "    threading.Thread(target=time.sleep, args=(600,), daemon=True, name='pool').start()\n"
    )
    python = make_environment(tmp_path / "venv", "threaded", body)
    node: Node = make_node(config=config(python, "threaded"))
    assert orchestrator.run("w1", {"taskType": "probe"}, task_id="p")["type"] == "TASK_SUCCEEDED"
    assert node.result("p")["preloaded"] is False
    (warning,) = [line for line in node.text().splitlines() if "not safe to fork" in line]
    assert "2 native threads" in warning
    assert "no preload" in node.ask(op="status")["warnings"]["other"]


def test_what_a_task_waited_in_the_queue_is_not_its_silence(
    orchestrator: Orchestrator, make_node, tmp_path: Path
) -> None:
    """A task that does its own imports sends no frames at first; it has the whole tasks.hang_timeout_s for that."""
    body = BODY + "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    python = make_environment(tmp_path / "venv", "threaded", body)
    ours = next(python.parents[1].rglob("site-packages")) / "runners"
    ours.mkdir()
    slow = f"import time\ntime.sleep(1.2)\n__path__.append({str(ROOT / 'runners')!r})\n"
    (ours / "__init__.py").write_text(slow)
    make_node(config=config(python, "threaded") + "[tasks]\nhang_timeout_s = 3\n", env={"PYTHONPATH": ""})
    orchestrator.run("w1", {"taskType": "probe"})  # starts its fork server
    first = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 3.5})
    second = orchestrator.dispatch("w1", {"taskType": "probe"})
    for task in (first, second):
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED", orchestrator.ends(task)


def test_an_interpreter_without_our_package_offers_nothing_and_says_what_to_install(
    orchestrator: Orchestrator, make_node, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    make_node(config=config(tmp_path / "bare" / "bin" / "python", "nothing"), env={"PYTHONPATH": ""})
    end = orchestrator.run("w1", {"taskType": "probe"})
    assert end["payload"]["error_kind"] == "missing_dependency"
    assert "-m pip install " in end["error"]


def test_an_interpreter_that_is_not_there_is_a_settings_error(make_node) -> None:
    node: Node = make_node(start=False, config='[environments.other]\npython = "/no/such/python"\n')
    node.start(wait=False)
    assert node.process is not None
    assert node.process.wait(20) == 78
    assert "environments.other.python" in node.text()
