"""`flowmesh completion`, `cost` and `loss`, and the charts that they and `top` draw."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
from rich.cells import cell_len

from flowmesh.cli import chart, completing, show
from flowmesh.cli.cost import summed
from flowmesh.cli.loss import as_svg, drawn, history_of
from flowmesh.cli.main import cli, main
from flowmesh.cli.top import frame
from flowmesh.cli.top.picture import Gpu, Host, Picture, Slot, Task
from flowmesh.tasks.history import Detail, Entry, Found
from tests.kit.paths import ROOT


def test_bars_and_sparklines() -> None:
    assert chart.bar(0.5, 4) == "██░░"
    assert chart.bar(None, 3) == "░░░"
    assert [len(chart.bar(share, 7)) for share in (-1, 0, 0.3, 0.999, 1, 5)] == [7] * 6
    assert chart.spark([1, 2, 3, 4], 4) == "▁▃▆█"
    assert len(chart.spark(list(range(1000)), 8)) == 8
    assert chart.spark([2.0, float("nan"), 2.0], 5) == "▄▄"
    assert chart.spark([], 5) == ""
    assert "".join(chart.braille([(0, 0), (1, 1)], 2, 1)) == "⡠⠊"


@pytest.mark.parametrize("width", [40, 61, 80, 120, 200])
@pytest.mark.parametrize("height", [5, 12, 23, 60])
def test_no_line_is_too_long_and_the_selected_task_is_shown(width: int, height: int) -> None:
    tasks = tuple(
        Task(task_id=f"任务-{number}-" + "x" * 60, state="running", phase="[red]\x1b[31m", done=1, total=3)
        for number in range(30)
    )
    slots = tuple(Slot(worker_id=f"w-{number}", status="DEGRADED", reason="r" * 300) for number in range(8))
    gpus = tuple(Gpu(index=number, name="H100", trouble="lost " * 50) for number in range(8))
    picture = Picture(of="node", about=("node",), running=tasks, slots=slots, gpus=gpus)
    lines = frame.body(picture, width, height, tasks[29].task_id)
    assert len(lines) <= height
    assert max(line.cell_len for line in lines) <= width
    assert not any("\x1b" in line.plain for line in lines)
    if height >= 12:
        assert any("▸" in line.plain for line in lines)


def test_a_node_without_gpus_shows_cpu_and_memory() -> None:
    host = Host(cpu_percent=50, cpus=4, memory_used_bytes=2**30, memory_total_bytes=2**32)
    picture = Picture(of="node", about=("node",), slots=(Slot(worker_id="w", name="main", status="IDLE"),), host=host)
    text = "\n".join(line.plain for line in frame.body(picture, 80, 23))
    assert "CPU █████░░░░░ 50% of 4 cores" in text
    assert "1.0G of 4.0G" in text
    assert "main IDLE  w" in text
    assert "GPUs" not in text


def test_costs_are_summed_and_the_dearest_come_first() -> None:
    entries = [
        Entry(task_id="a", type="sft", owner="ann", verdict="ok", gpu_s=3600, joules=3.6e6, cost_usd=2.0),
        Entry(task_id="b", type="sft", owner="bob", verdict="error", gpu_s=1800, joules=None, cost_usd=1.0),
        Entry(task_id="c", type="echo", verdict="ok", cost_usd=None),
    ]
    sft, echo = summed(entries, "type", 0.25)
    assert (sft.of, sft.tasks, sft.failed, sft.gpu_hours, sft.kwh, sft.without_energy) == ("sft", 2, 1, 1.5, 1.0, 1)
    assert (sft.slot_usd, sft.energy_usd, sft.total_usd) == (3.0, 0.25, 3.25)
    assert echo.total_usd == 0.0
    assert [each.of for each in summed(entries, "owner", None)] == ["ann", "bob", "(none)"]
    assert summed(entries, "task", None)[0].energy_usd is None


def test_a_loss_is_drawn_in_the_terminal_and_as_svg() -> None:
    result = {
        "ok": True,
        "training": {"loss_history": [{"step": s, "loss": 2 / s} for s in range(1, 50)] + [{"step": "x"}]},
    }
    points = history_of(result)
    assert len(points) == 49
    lines = drawn("任务", points, 80)
    assert lines[0] == "loss of 任务: 2 to 0.04082"
    assert all(cell_len(line) <= 80 for line in lines)
    assert lines[1].startswith("      2 ┤")
    root = ElementTree.fromstring(as_svg("<script>&\x1b", points))
    assert "<script>&" in "".join(root.itertext())
    assert history_of({"loss_history": "no list"}) == []


def test_show_has_a_trainings_loss_in_a_line(tmp_path: Path) -> None:
    history = [{"step": step, "loss": 4 / step} for step in (1, 2, 4)]
    (tmp_path / "responses.json").write_text(json.dumps({"metrics": {"loss_history": history}}))

    def shown(task_type: str) -> str:
        entry = Entry(task_id="t", type=task_type, verdict="ok", finished_at="2026", out_dir=str(tmp_path))
        return "\n".join(show.lines(Found(entry=entry, detail=Detail()), None, None, []))

    assert "loss: 4 █▃▁ 1\n" in shown("sft")
    assert "loss:" not in shown("echo")


def test_a_finished_tasks_loss_is_read_from_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "results" / "t1"
    folder.mkdir(parents=True)
    (folder / "responses.json").write_text(json.dumps({"metrics": {"loss_history": [{"step": 1, "loss": 0.5}]}}))
    (tmp_path / "node.toml").write_text(f'[results]\ndir = "{tmp_path}/results"\n[node]\nstate_dir = "{tmp_path}/s"\n')
    with pytest.raises(SystemExit) as ended:
        main(["loss", "t1", "--config", str(tmp_path / "node.toml"), "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"task_id": "t1", "so_far": False, "points": [[1.0, 0.5]]}
    at = ("--config", str(tmp_path / "node.toml"))
    drawn = importlib.util.find_spec("PIL") is not None
    png, svg = ("t1", "--png", "/nowhere/t1.png"), ("t1", "--svg", "/nowhere/t1.svg")
    for arguments, code in ((png, 1 if drawn else 78), (svg, 1), (("t2",), 1)):
        with pytest.raises(SystemExit) as ended:
            main(["loss", *arguments, *at])
        assert ended.value.code == code
    errors = capsys.readouterr().err
    assert (
        "--png: /nowhere/t1.png cannot be written: No such file or directory\n" if drawn else "--png needs Pillow"
    ) in errors
    assert "--svg: /nowhere/t1.svg cannot be written: No such file or directory\n" in errors
    assert "t2/responses.json does not exist: the task has no result" in errors
    (folder / "responses.json").unlink()
    (folder / "responses.json").symlink_to("/etc/passwd")
    with pytest.raises(SystemExit) as ended:
        main(["loss", "t1", "--config", str(tmp_path / "node.toml")])
    assert ended.value.code == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_says_how_to_install_it(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", shell])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("# ")
    assert f"flowmesh completion {shell}" in out.splitlines()[0]
    assert f"{shell}_complete" in out
    assert "_flowmesh_completion" in out
    assert re.search(r"(compdef|-F|--command) ?\w* flowmesh-node\b", out), "the command's second name"


def test_commands_are_completed_without_importing_them() -> None:
    script = (
        "import sys\nfrom flowmesh.cli.main import main\ntry:\n    main([])\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules)"
    )
    env = {
        "_FLOWMESH_COMPLETE": "bash_complete",
        "COMP_WORDS": "flowmesh ca",
        "COMP_CWORD": "1",
        "PATH": "/usr/bin:/bin",
    }
    ran = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[0] == "plain,cancel"
    assert "redis" not in ran.stdout.split()


def test_ids_are_completed_from_the_node_and_nothing_where_none_answers(short_path: Path) -> None:
    command = cli.get_command(click.Context(cli), "logs")
    assert command is not None
    ctx = click.Context(command)
    ctx.params = {"state_dir": str(short_path)}
    task = next(each for each in command.params if each.name == "task_id")
    assert task.shell_complete(ctx, "t") == []
    (short_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(short_path / "run" / "control.sock"))
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            connection.recv(1000)
            answer = {"ok": True, "tasks": [{"task_id": "t-2"}, {"task_id": "other"}], "recent": [{"task_id": "t-1"}]}
            connection.sendall(json.dumps(answer).encode() + b"\n")
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        assert [item.value for item in task.shell_complete(ctx, "t")] == ["t-1", "t-2"]
        completing.WAIT_S, before = 0.05, completing.WAIT_S
        try:
            assert task.shell_complete(ctx, "t") == []  # it is connected, and nobody answers
        finally:
            completing.WAIT_S = before


@pytest.fixture
def short_path() -> Path:
    from tests.kit.support import short_dir

    return short_dir()
