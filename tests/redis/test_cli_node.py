"""`flowmesh status`, `cancel`, `drain` and `logs` with a fake node on a real control socket."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from flowmesh.cli.control import Control, Refused
from flowmesh.cli.control_types import Ended, PhaseSeen, ProgressSeen, StateSeen
from flowmesh.cli.embedded import EmbeddedRedis
from flowmesh.errors import ProtocolError, UnavailableError
from tests.kit.paths import ROOT

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the state and results folders of a running fake node."""
    folder = tmp_path_factory.mktemp("node")
    with EmbeddedRedis() as server:
        settings = {
            "redis.url": server.url,
            "node.state_dir": folder / "state",
            "node.worker_id": "w",
            "results.dir": folder / "results",
        }
        node = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.kit.fake_node",
                *(f"--set={key}={value}" for key, value in settings.items()),
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                Control(folder / "state").close()
                break
            except UnavailableError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield folder
        node.kill()
        node.wait()


def start(place, *arguments):
    env = {name: value for name, value in os.environ.items() if name != "STATE_DIRECTORY"}
    return subprocess.Popen(
        [sys.executable, "-m", "flowmesh.cli.main", *arguments],
        cwd=place,
        env={**env, "PYTHONPATH": str(ROOT), "RESULTS_DIR": str(place / "results")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def flowmesh(place, *arguments):
    process = start(place, *arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.decode(), err.decode()


def task(place, name, *, ended=True, **files):
    """Create a task's folder with log files: `stdout="text"`, or `rank0_stderr="text"`."""
    logs = place / "results" / name / "logs"
    for label, text in files.items():
        path = logs / (label.removeprefix("rank").replace("_", "/") + ".log")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if ended:
        (logs.parent / "responses.json").write_text("{}")
        (logs.parent / "manifest.json").write_text("{}")
    return logs


def test_status(place):
    code, out, err = flowmesh(place, "status", "--state-dir", "state")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("node 0.1.0, pid ")
    assert lines[0].endswith("up 1.1 h, isolation cgroup, Redis up, 0 queued, 3 unsent events")
    assert lines[2].split() == ["WORKER", "SLOT", "STATUS", "TASK", "GPUS"]
    assert lines[3].split() == ["w", "all", "RUNNING", "task-1", "none"]
    assert lines[6].split()[:6] == ["task-1", "inference", "running", "generate", "12/64", "items"]


def test_status_as_json_is_the_nodes_own(place):
    code, out, _ = flowmesh(place, "status", "--state-dir", "state", "--json")
    assert code == 0
    assert json.loads(out)["of_a_newer_node"] == 1


def test_the_state_dir_comes_from_the_nodes_file(place):
    (place / "node.toml").write_text(f'[node]\nstate_dir = "{place}/state"\n')
    assert flowmesh(place, "status", "--config", "node.toml")[0] == 0
    (place / "bad.toml").write_text("[node]\nstate_dri = 1\n")
    code, _, err = flowmesh(place, "status", "--config", "bad.toml")
    assert code == 78
    assert "bad.toml: node.state_dri" in err


def test_no_node_there(place):
    code, out, err = flowmesh(place, "status", "--state-dir", "elsewhere")
    assert (code, out) == (69, "")
    assert err.startswith(f"flowmesh: no node answers at {place}/elsewhere/run/control.sock")
    assert err.count("\n") == 1


def test_cancel(place):
    task(place, "c1", ended=False, stdout="x")
    assert flowmesh(place, "cancel", "c1", "--state-dir", "state") == (0, "cancelling c1\n", "")
    assert flowmesh(place, "cancel", "c1", "--force", "--state-dir", "state") == (0, "killing c1\n", "")
    code, _, err = flowmesh(place, "cancel", "nobody", "--state-dir", "state")
    assert (code, err) == (1, "flowmesh: no task nobody on this node\n")


def test_drain(place):
    assert flowmesh(place, "drain", "--mode", "now", "--wait", "--state-dir", "state") == (
        0,
        "draining (now)\ndrained\n",
        "",
    )
    code, out, _ = flowmesh(place, "drain", "--state-dir", "state", "--json")
    assert (code, json.loads(out)) == (0, {"ok": True, "mode": "finish", "drained": False})
    assert flowmesh(place, "drain", "--mode", "later", "--state-dir", "state")[0] == 2
    assert "draining (finish)" in flowmesh(place, "status", "--state-dir", "state")[1]


def test_logs_of_one_file_are_as_they_are(place):
    task(place, "one", stdout=b"a\n\xff\x00b\nno end", stderr="")
    process = start(place, "logs", "one", "--raw", "--state-dir", "state")
    assert process.communicate(timeout=30) == (b"a\n\xff\x00b\nno end\n", b"")


def test_logs_of_several_files_have_a_prefix(place):
    task(place, "both", stdout="out 1\nout 2\n", stderr="err 1\n", rank0_stdout="r0\n", rank10_stdout="r10\n")
    code, out, _ = flowmesh(place, "logs", "both", "--state-dir", "state")
    assert code == 0
    assert out.splitlines() == [
        "stdout    | out 1",
        "stdout    | out 2",
        "stderr    | err 1",
        "0/stdout  | r0",
        "10/stdout | r10",
    ]
    assert flowmesh(place, "logs", "both", "--stderr", "--state-dir", "state")[1] == "err 1\n"
    assert flowmesh(place, "logs", "both", "--stdout", "-n", "1", "--state-dir", "state")[1].splitlines() == [
        "stdout    | out 2",
        "0/stdout  | r0",
        "10/stdout | r10",
    ]


@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize(("count", "first"), [(0, 7), (1, 6), (3, 4), (7, 0), (100, 0)])
def test_the_last_lines(place, count, first, ending):
    lines = [f"{n} " + "x" * 30_000 for n in range(7)]
    task(place, "long", stdout="\n".join(lines) + ending)
    code, out, _ = flowmesh(place, "logs", "long", "-n", str(count), "--state-dir", "state")
    assert code == 0
    assert out.splitlines() == lines[first:]


def test_a_line_longer_than_any_block(place):
    task(place, "wide", stdout="y" * 5_000_000 + "\nend")
    assert flowmesh(place, "logs", "wide", "--state-dir", "state")[1] == "y" * 5_000_000 + "\nend\n"


def test_logs_without_a_node(place):
    task(place, "done", stdout="text\n")
    assert flowmesh(place, "logs", "done", "--state-dir", "elsewhere")[:2] == (0, "text\n")
    assert flowmesh(place, "logs", "done", "--results-dir", "results")[:2] == (0, "text\n")
    code, out, _ = flowmesh(place, "logs", "done", "--results-dir", "results", "--json")
    assert code == 0
    assert json.loads(out)["files"] == [f"{place}/results/done/logs/stdout.log"]


def test_logs_of_nothing(place):
    code, _, err = flowmesh(place, "logs", "nobody", "--state-dir", "state")
    assert code == 1
    assert err.startswith("flowmesh: task nobody not found: ")
    assert err.count("\n") == 1
    code, _, err = flowmesh(place, "logs", "../../etc", "--state-dir", "state")
    assert code == 2


@pytest.mark.parametrize("ask", [("--state-dir", "state"), ("--results-dir", "results")])
def test_follow_until_the_task_ends(place, ask):
    name = f"live{ask[0]}"
    logs = task(place, name, ended=False, stdout="old 1\nold 2\n")
    process = start(place, "logs", "-f", "-n", "1", name, *ask)
    assert process.stdout.readline() == b"old 2\n"
    with (logs / "stdout.log").open("a") as file:
        file.write("new ")
        file.flush()
        file.write("line\n")
    assert process.stdout.readline() == b"new line\n"
    (logs / "stderr.log").write_text("trouble\n")
    assert process.stdout.readline() == b"stderr | trouble\n"
    (logs / "stdout.log").unlink()
    (logs / "stdout.log").write_text("rotated\n")
    assert process.stdout.readline() == b"stdout | rotated\n"
    assert process.poll() is None
    with (logs / "stdout.log").open("a") as file:
        file.write("last words")
    task(place, name)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, b"stdout | last words\n", b"")


def test_follow_ends_with_ctrl_c_and_with_its_reader(place):
    task(place, "endless", ended=False, stdout="x\n")
    process = start(place, "logs", "-f", "endless", "--state-dir", "state")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    task(place, "endless", stdout="x\n" * 1_000_000)
    process = start(place, "logs", "endless", "--state-dir", "state")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(30)
    process.stderr.close()


class Peer:
    """A control socket that sends the given lines to its first client, then closes."""

    def __init__(self, folder, *lines, end=True):
        (folder / "run").mkdir()
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(str(folder / "run" / "control.sock"))
        self.sock.listen()
        self.thread = threading.Thread(target=self.answer, args=(lines,), daemon=True)
        self.thread.start()

    def answer(self, lines):
        connection, _ = self.sock.accept()
        with connection:
            connection.recv(4096)
            for line in lines:
                connection.sendall(line)
        self.sock.close()


def test_watch_gives_what_the_node_says(tmp_path):
    Peer(
        tmp_path,
        b'{"event":"state","sta',
        b'te":"running"}\n{"event":"phase","phase":"load"}\n{"ok":true}\n{"event":"new thing"}\n',
        b'{"event":"progress","done":1,"total":null,"unit":"s","metrics":{"loss":1}}\n',
        b'{"event":"end","ok":false,"verdict":"crash","error":"SIGSEGV","out_dir":"/o","more":1}\n{"event":"state"}\n',
    )
    with Control(tmp_path) as control:
        assert list(control.watch("t")) == [
            StateSeen("running"),
            PhaseSeen("load"),
            ProgressSeen(done=1, unit="s", metrics={"loss": 1}),
            Ended(ok=False, verdict="crash", error="SIGSEGV", out_dir="/o"),
        ]


def test_watch_tells_of_a_node_that_goes_away(tmp_path):
    Peer(tmp_path, b'{"event":"phase","phase":"load"}\n{"event":')
    with Control(tmp_path) as control, pytest.raises(UnavailableError, match="closed the connection"):
        list(control.watch("t"))


def test_a_refusal_and_nonsense(tmp_path):
    for number, (line, error) in enumerate(
        [
            (b'{"ok":false,"error":"no such op"}\n', Refused),
            (b'{"ok":true,"pid":"one"}\n', ProtocolError),
            (b"hello\n", ProtocolError),
            (b"[]\n", ProtocolError),
            (b"", UnavailableError),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        Peer(folder, line)
        with Control(folder) as control, pytest.raises(error):
            control.status()
