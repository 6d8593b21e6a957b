"""What a start refuses before it holds anything; the rest is in tests/redis/test_reload.py, on nodes that run."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh.errors import ConfigError
from flowmesh.processes.server_client import socket_name
from flowmesh.settings.load import load
from flowmesh.settings.schema import Settings
from flowmesh.startup import preflight
from flowmesh.startup.state_dir import check_sockets
from tests.kit.support import ROOT, short_dir


@pytest.fixture
def short() -> Iterator[Path]:
    folder = short_dir()
    yield folder
    shutil.rmtree(folder)


def settings(tmp_path: Path, **overrides: str) -> Settings:
    given = {"redis.url": "redis://h", "results.dir": str(tmp_path / "results"), "node.state_dir": "/s"}
    return load(None, {}, given | {name.replace("__", "."): text for name, text in overrides.items()}).settings


def refusal(tmp_path: Path, **overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        preflight.check(settings(tmp_path, **overrides), {})
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_folders_and_the_log_are_made_and_nothing_in_them_is_changed(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "node.jsonl"
    preflight.check(settings(tmp_path, node__log_file=str(log)), {})
    assert (tmp_path / "results").is_dir()
    log.write_text("line\n")
    preflight.check(settings(tmp_path, node__log_file=str(log)), {})
    assert log.read_text() == "line\n"
    assert not Path("/s").exists(), "the node's own folder is for the node that will hold it"


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for log, why in ((tmp_path, "is a directory"), (tmp_path / "file" / "x", ""), (tmp_path / ("x" * 300), "")):
        said = refusal(tmp_path, node__log_file=str(log))
        assert said.startswith(f"node.log_file: {log} cannot be opened: {why}")
        assert said.endswith("; set it to a file that can be written")


@pytest.mark.parametrize("environments", [[], ["default"], ["x" * 30]], ids=["none", "short", "long"])
def test_the_longest_state_dir_that_is_taken_is_the_longest_whose_sockets_the_kernel_takes(
    short: Path, environments: list[str]
) -> None:
    names = ["delivery", *environments]
    longest = 107 - len("/run/") - max(len(socket_name(name)) for name in names)
    folder = short / ("x" * (longest - len(str(short)) - 1))
    (folder / "run").mkdir(parents=True)
    check_sockets(folder, environments)
    for name in names:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(folder / "run" / socket_name(name)))
    error = f"node.state_dir: {folder}x has {longest + 1} bytes; at most {longest} fit, because of the unix sockets in "
    with pytest.raises(ConfigError, match=error):
        check_sockets(Path(f"{folder}x"), environments)


@pytest.mark.parametrize("words", [(), ("--check",)], ids=["start", "check"])
def test_the_start_and_the_check_say_so_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    state = tmp_path / ("x" * 100)
    flags = ["--redis-url", "redis://h", "--state-dir", str(state), "--results-dir", str(tmp_path / "r"), *words]
    command = [sys.executable, "-m", "flowmesh.cli.supervisor", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"flowmesh-supervisor: node.state_dir: {state} has ")
    assert not state.exists()


def test_the_check_makes_nothing(short: Path) -> None:
    flags = ["--state-dir", str(short / "s"), "--results-dir", str(short / "r"), "--check", "--json"]
    command = [sys.executable, "-m", "flowmesh.cli.supervisor", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout)["ok"] is True
    assert list(short.iterdir()) == []
