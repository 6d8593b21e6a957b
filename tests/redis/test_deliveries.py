"""P9: deliveries of a real node that fail, are killed, wait for a place, and are tried again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kit.http_server import Answer, Server, Stall
from tests.kit.support import ROOT, Node, Orchestrator, below, until

pytestmark = pytest.mark.redis
CONFIG = """
[delivery]
total_timeout_s = {total_s}
concurrency = {concurrency}

[task_types.model]
runner = "tests.kit.delivery_runners:ModelRunner"
environment = "light"

[task_types.spool]
runner = "tests.kit.delivery_runners:SpoolRunner"
environment = "light"

[task_types.outcome]
runner = "tests.kit.delivery_runners:OutcomeRunner"
environment = "light"
"""


def config(total_s: float = 60.0, concurrency: int = 2) -> str:
    return CONFIG.format(total_s=total_s, concurrency=concurrency)


def model_to(server: Server, **fields: Any) -> dict[str, Any]:
    destination = {"type": "http", "url": f"{server.url}/r", **fields}
    return {"taskType": "model", "output": {"destination": destination}}


def flowmesh(node: Node, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flowmesh.cli.main", *words, "--state-dir", str(node.state_dir)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def children(node: Node) -> list[int]:
    """Pids of the node's delivery children."""
    servers = [server["pid"] for server in node.ask(op="status")["servers"] if server["environment"] == "delivery"]
    return [pid for server in servers for pid in below(server)]


def refused(orchestrator: Orchestrator, server: Server, status: int = 413) -> str:
    """Run a task whose delivery fails, because the server refuses it; returns its id.

    413 is final at once; a status from 500 is tried again until `delivery.total_timeout_s`.
    """
    server.plan = [Answer(status, b"no room")] * 1000
    task = orchestrator.dispatch("w1", model_to(server))
    end = orchestrator.wait_end(task)
    assert end["type"] == "TASK_FAILED"
    assert end["payload"]["error_kind"] == "delivery_failed"
    assert "no room" in end["error"]
    return task


def test_p9_what_was_computed_is_delivered_again_by_a_command(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=config(total_s=1.0), env={"ORCHESTRATOR_TOKEN": "s3cret"})
    with Server() as server:
        task = refused(orchestrator, server, status=500)
        assert (node.results_dir / task / "final_model" / "weights.bin").stat().st_size == 2_048_000
        code, out, err = said(flowmesh(node, "deliver", task))
        assert (code, out) == (1, "")
        assert err.startswith(f"flowmesh: {task}: ")
        assert "no room" in err
        node.kill()
        (node.home / "node.toml").write_text(config())  # from here on with time for what succeeds
        node.start()  # a restart, with its sweep of the spool, keeps the result
        server.plan = []
        code, out, err = said(flowmesh(node, "deliver", task, "--json"))
        assert (code, err) == (0, "")
        assert json.loads(out)["urls"] == [f"{server.url}/r/{task}/files/final_model.tar.gz"]
        assert server.files()["final_model.tar.gz"].file_size > 2_000_000
        (result,) = server.results()
        assert result["final_model_archive_uploaded"] is True
        assert node.result(task)["final_model_archive_uploaded"] is True
        assert list((node.state_dir / "spool").iterdir()) == []
        orchestrator.run("w1", {"taskType": "echo"})
        assert len(orchestrator.ends(task)) == 1
        code, out, err = said(flowmesh(node, "deliver", task))
        assert code == 1
        assert "it was delivered already" in err


def test_deliver_says_what_is_wrong(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=config(total_s=6.0))
    assert "has no record of this task" in said(flowmesh(node, "deliver", "never-heard-of"))[2]
    orchestrator.run("w1", {"taskType": "echo", "delaySec": -1, "long": "x" * 70_000}, task_id="bad")
    assert "it has no result to deliver (bad_request" in said(flowmesh(node, "deliver", "bad"))[2]
    running = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 600})
    orchestrator.wait_started(running)
    assert "it has not ended yet (running)" in said(flowmesh(node, "deliver", running))[2]
    node.ask(op="cancel", task_id=running)
    orchestrator.wait_end(running)
    assert "it has no result to deliver (cancelled" in said(flowmesh(node, "deliver", running))[2]
    with Server() as server:
        task = refused(orchestrator, server)
        server.plan = [Stall(1000)]
        first = flowmesh(node, "deliver", task)
        until(lambda: server.plan == [], "the first command's upload has started")
        assert "it is being delivered now" in said(flowmesh(node, "deliver", task))[2]
        assert said(first)[0] == 1  # total_timeout_s limits this delivery, too
        assert said(flowmesh(node, "deliver", task))[0] == 0
        task = refused(orchestrator, server)
        (spool,) = (node.state_dir / "spool").iterdir()
        (spool / "delivery.json").unlink()
        assert "this node keeps nothing of it for delivery" in said(flowmesh(node, "deliver", task))[2]


def test_deliver_is_cut_short_by_nothing_but_a_kill(orchestrator: Orchestrator, make_node) -> None:
    """A drain or the end of the command does not stop it. After a kill of its child it can be tried again."""
    node = make_node(config=config())
    with Server() as server:
        task = refused(orchestrator, server)
        server.plan = [Stall(1000)]
        asked = flowmesh(node, "deliver", task)
        until(lambda: server.plan == [], "the upload has started")
        (child,) = children(node)
        os.kill(child, signal.SIGKILL)
        code, _, err = said(asked)
        assert code == 1
        assert "killed by SIGKILL" in err
        server.plan = [Answer(503, headers={"Retry-After": "1"})]
        asked = flowmesh(node, "deliver", task)
        until(lambda: server.plan == [], "the server has answered with Retry-After")
        asked.kill()
        asked.communicate()
        assert node.stop() == 0
        assert len(server.results()) == 1


def test_deliver_gives_way_to_the_nodes_end_and_to_the_task_itself(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=config())
    with Server() as server:
        task = refused(orchestrator, server)
        server.plan = [Stall(1000)]
        asked = flowmesh(node, "deliver", task)
        until(lambda: server.plan == [], "the upload has started")
        node.process.send_signal(signal.SIGTERM)
        until(lambda: "draining mode=finish" in node.text(), "it drains")
        assert node.stop() == 0  # the second SIGTERM: drain "now"
        assert said(asked)[0] != 0
        assert server.received == []
        node.start()
        server.plan = [Stall(1000)]
        asked = flowmesh(node, "deliver", task)
        until(lambda: server.plan == [], "the upload has started")
        orchestrator.dispatch("w1", model_to(server), task_id=task)
        code, _, err = said(asked)
        assert code == 1
        assert "there is a new attempt at the task" in err
        until(lambda: len({event["ts"] for event in orchestrator.ends(task)}) == 2, "the second attempt has ended")
        assert orchestrator.ends(task)[-1]["type"] == "TASK_SUCCEEDED"
        assert len(server.results()) == 1


def test_a_delivery_child_that_is_killed_in_mid_upload_goes_on(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=config())
    with Server(Stall(1_000_000)) as server:
        task = orchestrator.dispatch("w1", model_to(server))
        until(lambda: server.plan == [], "the upload has started")
        (child,) = children(node)
        os.kill(child, signal.SIGKILL)
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
        assert server.files()["final_model.tar.gz"].file_size > 2_000_000
        assert len(server.received) == 2
        assert "delivery starts again" in node.text()


@pytest.mark.parametrize("with_child", [False, True], ids=["supervisor", "both"])
def test_a_supervisor_killed_in_mid_delivery_goes_on_with_it(
    orchestrator: Orchestrator, make_node, with_child: bool
) -> None:
    node = make_node(config=config())
    with Server(Stall(1_000_000)) as server:
        task = orchestrator.dispatch("w1", model_to(server, timeoutSec=60))
        until(lambda: server.plan == [], "the upload has started")
        (child,) = children(node)
        node.kill()
        if with_child:
            os.kill(child, signal.SIGKILL)
        node.start()
        server.release()
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
        orchestrator.run("w1", {"taskType": "echo"})
        assert len(orchestrator.ends(task)) == 1
        assert len(server.results()) == 1
        assert node.result(task)["final_model_archive_uploaded"] is True


def test_deliveries_at_once_are_bounded(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=config(concurrency=2))
    with Server(Stall(), Stall()) as server:
        tasks = [orchestrator.dispatch("w1", model_to(server, timeoutSec=60)) for _ in range(5)]
        states = ["delivering"] * 5
        until(
            lambda: [each["state"] for each in node.ask(op="status")["tasks"]] == states,
            "five tasks are being delivered",
        )
        until(lambda: server.plan == [], "two uploads have started")
        orchestrator.run("w1", {"taskType": "echo"})  # meanwhile a third one would have started
        assert len(children(node)) == 2
        assert len(server.requests) == 2
        server.release()
        assert [orchestrator.wait_end(task)["type"] for task in tasks] == ["TASK_SUCCEEDED"] * 5


def test_a_drain_waits_for_deliveries(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=config())
    with Server(Answer(503, headers={"Retry-After": "1"})) as server:
        task = orchestrator.dispatch("w1", model_to(server))
        until(lambda: server.plan == [], "the server has answered with Retry-After")
        assert node.stop() == 0
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
        assert len(server.results()) == 1


def test_a_model_that_was_uploaded_may_go(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(config=config(), env={"MODEL_CLEANUP_AFTER_UPLOAD": "true"})
    with Server() as server:
        task = orchestrator.dispatch("w1", model_to(server))
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
        assert server.files()["final_model.tar.gz"].file_size > 2_000_000
    folder: Path = node.results_dir / task
    assert sorted(path.name for path in folder.iterdir()) == ["artifacts", "logs", "manifest.json", "responses.json"]
    names = {entry["name"] for entry in json.loads((folder / "manifest.json").read_text())["entries"]}
    assert "final_model.tar.gz" not in names


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        ('{"a": "\xff"}', "crash"),
        ("[1]", "crash"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "crash"),
        ("tru", "crash"),
    ],
    ids=["no UTF-8", "no mapping", "deep", "no JSON"],
)
def test_whatever_lies_where_the_outcome_belongs_the_task_ends(
    orchestrator: Orchestrator, make_node, outcome: str, kind: str
) -> None:
    make_node(config=config())
    end = orchestrator.run("w1", {"taskType": "outcome", "outcome": outcome}, 20)
    assert (end["type"], end["payload"]["error_kind"]) == ("TASK_FAILED", kind)
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


@pytest.mark.parametrize("left", ["a pipe", "a folder", "a link"])
def test_an_outcome_that_is_no_file_of_its_own_holds_nobody_up(
    orchestrator: Orchestrator, make_node, left: str
) -> None:
    make_node(config=config())
    spec = {"taskType": "spool", "name": "outcome.json", "left": left, "then": "exit"}
    assert orchestrator.run("w1", spec, 20)["payload"]["error_kind"] == "crash"
    assert orchestrator.run("w1", {"taskType": "echo"}, 20)["type"] == "TASK_SUCCEEDED"


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("delivered.json", "garbage"),
        ("delivered.json", '{"ok": true}'),
        ("delivered.json", "a pipe"),
        ("delivered.json", "a folder"),
        ("delivered.json", "a link"),
        ("delivery.json", "a pipe"),
        ("delivery.json", "a folder"),
        ("delivery_state.json", '{"attempt": ATTEMPT, "results": ["t-1"]}'),
        ("delivery_state.json", "a pipe"),
    ],
)
def test_a_task_writes_no_notes_of_its_delivery(orchestrator: Orchestrator, make_node, name: str, left: str) -> None:
    """Files that a task leaves in place of the delivery's notes neither fake a delivery nor block its end."""
    node = make_node(config=config())
    with Server() as server:
        destination = {"type": "http", "url": f"{server.url}/r"}
        spec = {"taskType": "spool", "name": name, "left": left, "output": {"destination": destination}}
        assert orchestrator.run("w1", spec, 20, task_id="t-1")["type"] == "TASK_SUCCEEDED"
        assert len(server.results()) == 1
    until(lambda: list((node.state_dir / "spool").iterdir()) == [], "its spool folder is gone")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_while_it_is_delivered_no_task_gets_at_its_spool_folder(orchestrator: Orchestrator, make_node) -> None:
    node = make_node(start=False, config=config() + '\n[processes]\ntask_user = "nobody"\n')
    node.home.chmod(0o755)
    node.start()
    with Server(Stall(100)) as server:
        destination = {"type": "http", "url": f"{server.url}/r", "timeoutSec": 60}
        task = orchestrator.dispatch("w1", {"taskType": "echo", "output": {"destination": destination}})
        until(lambda: server.plan == [], "the upload has started")
        (spool,) = (node.state_dir / "spool").iterdir()
        status = spool.stat()
        assert (status.st_uid, status.st_mode & 0o777) == (0, 0o700)
        server.release()
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"


def test_what_new_settings_refuse_was_computed_and_can_be_delivered_later(
    orchestrator: Orchestrator, make_node
) -> None:
    with Server(Stall(1000)) as server:
        node = make_node(config=config(), env={"ORCHESTRATOR_BASE_URL": server.url})
        spec = {"taskType": "model", "output": {"destination": {"type": "http", "timeoutSec": 15}}}
        task = orchestrator.dispatch("w1", spec)
        until(lambda: server.plan == [], "the upload has started")
        node.kill()
        del node.env["ORCHESTRATOR_BASE_URL"]
        node.start()
        end = orchestrator.wait_end(task)
        assert end["payload"]["error_kind"] == "delivery_failed"
        assert "ORCHESTRATOR_BASE_URL" in end["error"]
        until(lambda: not children(node), "its delivery child has ended")
        assert said(flowmesh(node, "deliver", task))[0] == 0
        assert len(server.results()) == 1


def test_a_second_attempt_writes_into_its_folder_and_not_where_the_first_one_led(
    orchestrator: Orchestrator, make_node
) -> None:
    node = make_node()
    orchestrator.run("w1", {"taskType": "echo"}, task_id="again")
    elsewhere, folder = node.home / "elsewhere", node.results_dir / "again"
    elsewhere.mkdir()
    for name in ("logs", "artifacts"):
        shutil.rmtree(folder / name)
        (folder / name).symlink_to(elsewhere)
    orchestrator.dispatch("w1", {"taskType": "echo"}, task_id="again")
    until(lambda: len(orchestrator.ends("again")) == 2, "it ran again")
    assert orchestrator.ends("again")[-1]["type"] == "TASK_SUCCEEDED"
    assert list(elsewhere.iterdir()) == []
    assert (folder / "logs" / "stdout.log").exists()
