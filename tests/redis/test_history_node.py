"""What a node keeps of its tasks, and its commands; and what it refuses before any process is started."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from flowmesh.cli import history as command
from flowmesh.cli.main import cli
from flowmesh.client import Client
from flowmesh.errors import FieldError
from flowmesh.tasks.catalogue import BUILTIN
from flowmesh.tasks.checks import check_task
from tests.kit.support import Node, Orchestrator, RedisServer

pytestmark = pytest.mark.redis

BAD = {
    "echo": {"taskType": "echo", "delaySec": "soon", "delaySecs": 1},
    "inference": {"taskType": "inference", "inference": {"max_token": 3}, "data": {"type": "list"}},
    "sft": {"taskType": "sft", "training": {"learning_rat": 1}},
    "rag": {"taskType": "rag", "rag": {"top_k": "many"}},
}
TITLE = "\x1b]0;title\x07"


def flowmesh(*args: str, **env: str) -> tuple[int, str, str]:
    environment = {**os.environ, **env}
    done = subprocess.run(
        [sys.executable, "-m", "flowmesh.cli.main", *args], capture_output=True, text=True, env=environment, check=False
    )
    return done.returncode, done.stdout, done.stderr


def completed(name: str, incomplete: str, **params: str) -> list[str]:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    ctx = click.Context(found)
    ctx.params = dict(params)
    argument = next(each for each in found.params if isinstance(each, click.Argument))
    return [each.value for each in argument.shell_complete(ctx, incomplete)]


def dispatch(peer: Orchestrator, task_id: str, spec: dict[str, Any], **metadata: str) -> dict[str, Any]:
    peer.dispatch("w1", spec, task_id, task={"metadata": metadata, "spec": spec})
    return peer.wait_end(task_id)


def test_history_show_and_replay_of_one_node(orchestrator: Orchestrator, make_node, tmp_path: Path) -> None:
    node: Node = make_node()
    at = ("--state-dir", str(node.state_dir))
    dispatch(orchestrator, "task-a", {"taskType": "echo", "api_key": "sk-42", "word": "one"}, owner="ana", name=TITLE)
    dispatch(orchestrator, "task-b1", {"taskType": "echo", "long": "x" * 70_000, "delaySec": -1}, owner="bo")
    servers = node.servers()
    for kind, spec in BAD.items():
        end = dispatch(orchestrator, f"bad-{kind}", spec, owner="bo")
        checked, _ = check_task({"metadata": {"owner": "bo"}, "spec": spec}, {each.name: each for each in BUILTIN})
        assert end["payload"]["error_kind"] == "bad_request"
        assert end["payload"]["retryable"] is False
        assert all(fault in end["error"] for fault in checked.faults), "all of them, in the child's words"
        assert len(checked.faults) > (kind == "echo"), kind
    both = dispatch(orchestrator, "bad-both", {"taskType": "echo", "timeoutSec": "soon", "delaySec": -1})["error"]
    assert "spec.timeoutSec" in both, "the node's own fields"
    assert "spec.delaySec" in both, "and the type's"
    assert node.servers() == servers, "nothing was started for them"
    secret = dispatch(
        orchestrator, "bad-key", {"taskType": "echo", "api_key": "sk-98765432", "delaySec": "sk-98765432"}
    )
    assert "sk-98765432" not in json.dumps(secret)
    dispatch(orchestrator, "task-a", {"taskType": "echo", "word": "one", "delaySec": "x"}, owner="ana")
    running = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 600, "token": "hush"}, "task-run")
    orchestrator.wait_started(running)

    code, out, _ = flowmesh("history", *at)
    assert code == 0
    rows = out.splitlines()
    assert [row.split()[1] for row in rows[1:3]] == ["task-a", "task-b1"]
    assert "9 tasks, 8 failed" in out
    found = json.loads(flowmesh("history", *at, "--owner", "ana", "--json")[1])
    assert [(each["task_id"], each["verdict"]) for each in found["tasks"]] == [
        ("task-a", "bad_request"),
        ("task-a", "ok"),
    ]
    assert found["total"]["tasks"] == 2
    assert "bo" in flowmesh("history", *at, "--sum", "--since", "1h")[1]
    assert flowmesh("history", *at, "--since", "yesterday")[0] != 0

    shown = flowmesh("show", "task-r", *at)[1]
    assert "now: running wait" in shown
    assert " s so far\n" in shown
    assert "ran for" not in shown
    assert "hush" not in shown
    code, out, _ = flowmesh("show", "task-a", *at)
    assert "earlier attempts:" in out
    first = flowmesh("show", "task-a", *at, "--json")[1]
    assert "\x1b" not in out + shown + first
    several = flowmesh("show", "bad", *at)[2]
    assert "the beginning of several tasks' ids: bad-both" in several
    node.ask(op="cancel", task_id=running, force=True)
    orchestrator.wait_end(running)
    assert node.stop() == 0

    kept = json.loads(flowmesh("show", "task-b", *at, "--json")[1])
    assert [each["event"] for each in kept["timeline"]] == [
        "received", "launching", "running", "releasing", "delivering", "done",
    ]  # fmt: skip
    assert kept["detail"]["deliveries"] == 1
    assert (kept["task"]["owner"], kept["detail"]["evidence"]) == ("bo", "exit status 1")
    assert "responses.json" in [each["path"] for each in kept["files"]]

    for name, part in (("show", "task-"), ("replay", "task-")):
        assert completed(name, part, state_dir=str(node.state_dir)) == ["task-a", "task-b1", "task-run"]
    code, _, err = flowmesh("replay", "bad-key", *at)
    assert code != 0
    assert "--secret spec.api_key=VARIABLE" in err
    given = ("--secret", "spec.api_key=KEY", "--secret", "spec.delaySec=KEY")
    done = flowmesh("replay", "bad-key", *at, *given, "--results-dir", str(tmp_path), "--json", KEY="sk-98765432")
    again = json.loads(done[1])
    assert again["verdict"] == ["bad_request", "bad_request"]
    assert "hush" not in (node.state_dir / "journal.sqlite").read_bytes().decode(errors="replace")


def test_replay_says_where_runs_differ_and_stops_after_a_phase(
    orchestrator: Orchestrator, make_node, redis_server: RedisServer, tmp_path: Path
) -> None:
    node: Node = make_node("--set", "tasks.allow_command=*")
    at = ("--state-dir", str(node.state_dir), "--results-dir", str(tmp_path / "replays"))
    script = f"echo $$; test ! -e {tmp_path}/slow || sleep 60"
    spec = {"taskType": "command", "command": ["sh", "-c", script], "files": {"a.txt": "a"}}
    assert dispatch(orchestrator, "task-c", spec)["status"] == "DONE"
    with Client(redis_server.url) as client:
        assert client.wait(client.queue({"spec": {"taskType": "echo"}}, task_id="queued-1").task_id, 30).ok
    for name in ("wait", "result"):
        assert completed(name, "q", redis_url=redis_server.url) == ["queued-1"]
    assert node.stop() == 0

    again = flowmesh("replay", "task-c", *at)[1]
    assert "verdict   ok, as before" in again
    assert "outputs   1 value differs: stdout: " in again
    (tmp_path / "slow").touch()
    stopped = json.loads(flowmesh("replay", "task-c", *at, "--until", "fetch", "--json")[1])
    replay = subprocess.Popen(
        [sys.executable, "-m", "flowmesh.cli.main", "replay", "task-c", *at],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert replay.stdout is not None
    with replay.stdout as out:
        assert any(line == "  run\n" for line in out)
        replay.terminate()
        assert out.read().endswith("was cancelled\n"), "and compares nothing"
    assert replay.wait() == 128 + signal.SIGTERM
    assert (stopped["until"], stopped["compared"], stopped["verdict"]) == ("fetch", False, ["ok", "cancelled"])


def test_since_takes_ages_and_times() -> None:
    import datetime

    now = datetime.datetime(2026, 11, 28, 12, tzinfo=datetime.UTC)
    assert command.since_time("2d", now) == "2026-11-26T12:00:00+00:00"
    assert command.since_time("1.5h", now) == "2026-11-28T10:30:00+00:00"
    assert re.match(r"2026-11-2[67]T", command.since_time("2026-11-27", now))
    assert command.since_time("2026-11-01T00:00:00+01:00") == "2026-10-31T23:00:00+00:00"
    with pytest.raises(FieldError, match="--since"):
        command.since_time("soon", now)
