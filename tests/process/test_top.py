"""`flowmesh top` of a busy node and of its deployment, on real terminals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from flowmesh.cli.top.fleet_source import FleetSource
from flowmesh.errors import UnavailableError
from tests.kit import fake_node
from tests.kit.paths import ROOT
from tests.kit.support import RedisServer, until
from tests.kit.tmux import Tmux
from tests.kit.top_scene import SHOWN, Scene, scene, uuid_of

pytestmark = pytest.mark.redis
FLOWMESH = [sys.executable, "-m", "flowmesh.cli.main"]
LONG = SHOWN[4][0]


@pytest.fixture(scope="module")
def busy() -> Iterator[Scene]:
    with scene(8) as found:
        found.play(degraded=True)
        yield found


def of(found: Scene) -> list[str]:
    return [*FLOWMESH, "top", "--state-dir", str(found.node.state_dir)]


def on_screen(found: Scene, columns: int, lines: int, *more: str, **env: str | None) -> Tmux:
    return Tmux(
        [*of(found), *more], columns=columns, lines=lines, env={"PYTHONPATH": str(ROOT), "NO_COLOR": None, **env}
    )


def once(*arguments: str) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    ran = subprocess.run([*FLOWMESH, "top", *arguments], capture_output=True, check=True, cwd=ROOT, env=env, timeout=60)
    return ran.stdout.decode()


def test_a_status_with_a_limit_is_bounded_and_says_what_it_leaves_out(busy: Scene) -> None:
    whole, bounded = busy.node.ask(op="status"), busy.node.ask(op="status", limit=2)
    assert (len(whole["tasks"]), whole["tasks_left_out"]) == (13, 0)
    assert (len(bounded["tasks"]), bounded["tasks_left_out"]) == (8, 5)  # those that run, and two that wait
    assert "trend" not in whole["tasks"][0]
    sft = next(task for task in bounded["tasks"] if task["task_id"] == SHOWN[0][0])
    losses = sft["trend"]["loss"]
    assert len(losses) > 3
    assert losses[0] > losses[-1]
    assert sft["cost_usd"] > 0
    assert sft["elapsed_s"] > 0
    first = whole["gpus"][0]
    assert (first["utilization_percent"], first["temperature_c"], first["power_w"]) == (97, 66, 652.0)
    assert busy.node.ask(op="status", limit="all")["error"].startswith("limit: expected a whole number")


def test_the_command_line_of_a_task_names_it_and_its_fork_server(busy: Scene) -> None:
    pid = busy.node.task_pid(LONG)
    shown = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert shown[:2] == [b"flowmesh-task", LONG.encode()]
    assert b'.sock"' in shown[2]
    assert Path(f"/proc/{pid}/environ").read_bytes().count(b"\0") > 5  # what lies behind is whole
    assert Path(f"/proc/{pid}/comm").read_text() == "flowmesh-task\n"


def test_on_80_columns(busy: Scene) -> None:
    with on_screen(busy, 80, 24) as terminal:
        text = terminal.wait("Last verdicts", "q quit", "attempt ", "delivery_failed", "tok/s", "loss 0.74")
        lines = text.splitlines()
        assert max(map(cell_len, lines)) <= 80
        for part in (
            "5 running, 7 waiting, 1 delivering",
            "GPUs  ", " 0 █████▉  97%", "652 W 66 °C",
            "gpu7 DEGRADED", "gpu7: GPU 7 is used by a foreign process",
            SHOWN[0][0], " 67%", "loss 0.74", "tok/s",
            "report-2026-11", "attempt ", "delivery_failed",
        ):  # fmt: skip
            assert part in text, part
        assert "triage" in text  # its id is cut, and stays recognizable
        assert "-0007" in text
        coloured = terminal.screen(colours=True)
        assert "\x1b[" in coloured
        assert "\x1b[31mdata" not in coloured
        assert "\x1b[1mleft" not in coloured
        assert terminal.in_alternate_screen


def test_on_160_columns_without_colour_and_then_on_few(busy: Scene) -> None:
    with on_screen(busy, 160, 45, "--sort", "progress", NO_COLOR="1") as terminal:
        text = terminal.wait("Fork servers", "q quit")
        for part in (
            "H100 80GB HBM3", "72/80G", "w1-gpu3", LONG, "12 steps", "ENERGY", "kJ", "sft-sweep-06", "Machine", "CPU ",
            r"RuntimeError: no rows [bold]left[/bold] in \x1b[31mdata\x1b[0m of shard 3", "the server answered 403",
            "bare ready",
        ):  # fmt: skip
            assert part in text, part
        assert text.index(SHOWN[0][0]) < text.index(SHOWN[2][0]) < text.index(SHOWN[1][0])  # 67 %, 62 %, 15 %
        assert not re.search(r"\x1b\[(3[0-7]|9[0-7])m", terminal.screen(colours=True))
        terminal.resize(50, 14)
        small = terminal.wait("Running  5", "67%")
        assert max(map(cell_len, small.splitlines())) <= 50
        terminal.press("C-c")
        terminal.wait_left(130)


def test_keys_select_cancel_and_follow_logs(busy: Scene) -> None:
    task_id = busy.start("w1-gpu5", "told-more", "agent", {"log": ["first \x1b]0;title\x07 line", "[red]second[/red]"]})
    busy.wait_shown(task_id)
    with on_screen(busy, 100, 40) as terminal:
        terminal.wait(task_id, "q quit")
        for _ in range(6):
            terminal.press("Down")
        assert f"▸  {task_id}" in terminal.wait(f"▸  {task_id}")
        terminal.press("l")
        text = terminal.wait(f"logs of {task_id}", "q back")
        assert "[red]second[/red]" in text
        assert r"first \x1b]0;title\x07 line" in text
        with open(busy.node.results_dir / task_id / "logs" / "stdout.log", "a") as log:
            log.write("and a third\n")
        terminal.wait("and a third")
        terminal.press("q", "c")
        terminal.wait(f"cancel {task_id}? y/n")
        terminal.press("n")
        terminal.wait("not cancelled")
        assert any(task["task_id"] == task_id for task in busy.node.ask(op="status")["tasks"])
        terminal.press("c", "y")
        terminal.wait(f"cancelling {task_id}")
        assert busy.peer.wait_end(task_id)["payload"]["error_kind"] == "cancelled"
        terminal.wait("cancelled  ")  # its verdict
        terminal.press("?")
        terminal.wait("follow its logs")
        terminal.press("x", "q")
        terminal.wait_left(0)


def test_a_signal_ends_it_and_the_terminal_is_as_it_was(busy: Scene) -> None:
    with on_screen(busy, 80, 24) as terminal:
        terminal.wait("q quit", "Running")
        os.kill(terminal.pid, signal.SIGTERM)
        terminal.wait_left(143)


def test_a_dumb_terminal_gets_one_picture_and_a_word(busy: Scene) -> None:
    env = {"PYTHONPATH": str(ROOT)}
    with Tmux(["env", "TERM=dumb", *of(busy)], columns=100, lines=60, env=env) as terminal:
        assert "TERM is dumb or not set" in terminal.wait("left 0", "Fork servers")


def test_no_terminal_and_json(busy: Scene) -> None:
    text = once("--state-dir", str(busy.node.state_dir))
    assert "\x1b" not in text
    assert LONG in text
    found = json.loads(once("--state-dir", str(busy.node.state_dir), "--json"))
    assert found["of"] == "node"
    assert [gpu["utilization_percent"] for gpu in found["gpus"]][:2] == [97, 94]
    assert {task["task_id"] for task in found["running"]} >= {task_id for task_id, _, _ in SHOWN}


def test_the_deployment_with_a_worker_of_an_older_version(busy: Scene) -> None:
    client = busy.server.client()
    gpu = {"index": 0, "name": "NVIDIA A100", "uuid": "GPU-old", "memory_total_bytes": 40 * 2**30}
    hardware = {**fake_node.HARDWARE, "gpu": {"driver_version": None, "cuda_version": None, "gpus": [gpu]}}
    fake_node.register(client, "old", status="RUNNING", hardware=hardware, extra_task_id="old-task")
    fake_node.register(client, "odd", metrics_json='{"gpus": 3, "task": [], "recent": [1, {}], "queued": "x"}')
    fake_node.register(client, "gone", ttl=None)
    try:
        until(lambda: b"loss" in (client.hget("worker:w1-gpu0", "metrics_json") or b""), "its heartbeat has its task")
        source = FleetSource(busy.server.url)
        source.fetch()
        beat = {"power": {"gpu_watts": {"total": 99.0, "per_gpu": [{"index": 0, "power_w": 99.0}]}}}
        client.publish("workers.events", json.dumps({"type": "HEARTBEAT", "worker_id": "old", "metrics": beat}))
        client.publish("workers.events", b"\xff no JSON")
        picture = until(
            lambda: (found := source.fetch()) and any(g.power_w == 99.0 for g in found.gpus) and found, "heard"
        )
        source.close()
        assert {task.task_id for task in picture.running} >= {"old-task", *(task_id for task_id, _, _ in SHOWN)}
        sft = next(task for task in picture.running if task.task_id == SHOWN[0][0])
        assert (sft.done, sft.total, sft.phase) == (804, 1200, "train")
        assert next(gpu for gpu in picture.gpus if gpu.uuid == uuid_of(0)).utilization_percent == 97
        assert "adapter-upload-9" in {end.task_id for end in picture.recent}
        assert [task.task_id for task in picture.deliveries] == ["report-2026-11"]
        assert picture.queued == 7
        text = once("--redis", busy.server.url)
        for part in (
            "gone",
            "stale",
            "foreign process",
            "old-task",
            "10 of 11 workers alive",
            "sft-sweep-00",
            "and 2 more",
        ):
            assert part in text, part
        assert not client.pubsub_numsub("tasks.events")[0][1] > 1  # the peer of this test alone: see the module
    finally:
        for worker in ("old", "odd", "gone"):
            client.delete(f"worker:{worker}", f"worker:{worker}:hb")
            client.srem("workers:ids", worker)


def test_a_redis_that_goes_and_comes_back() -> None:
    server = RedisServer()
    try:
        fake_node.register(server.client(), "w")
        source = FleetSource(server.url)
        assert len(source.fetch().slots) == 1
        server.stop()
        with pytest.raises(UnavailableError, match="does not answer"):
            source.fetch()
        server.start()
        assert source.fetch().slots == ()
        source.close()
    finally:
        server.close()


def test_a_node_that_goes_away_and_comes_back(busy: Scene) -> None:
    with on_screen(busy, 90, 24) as terminal:
        terminal.wait("Running  5")
        busy.node.kill()
        assert "Running" not in terminal.wait("no node answers", "waiting for it")
        busy.node.start(wait=False)
        terminal.wait("Running  5", SHOWN[0][0])


def test_no_node_and_no_terminal_is_an_error(tmp_path: Path) -> None:
    command = [*FLOWMESH, "top", "--once", "--state-dir", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, check=False, cwd=ROOT)
    assert ran.returncode == 69
    assert b"no node answers" in ran.stderr
