"""`flowmesh run` as a process: its output, its exit status, and that it leaves nothing behind.

The node is replaced by `fake_node`, which implements the Redis contract and the control protocol.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from flowmesh.cli.private_folder import RUN_PREFIX, sweep_abandoned
from flowmesh.processes import linux
from tests.kit.paths import ROOT
from tests.kit.support import short_dir

pytestmark = pytest.mark.redis
EVENTS = [
    {"event": "state", "state": "queued"},
    {"event": "state", "state": "running"},
    {"event": "phase", "phase": "load"},
    {"event": "phase", "phase": "generate"},
    {"event": "progress", "done": 3, "total": 64, "unit": "items"},
    {"event": "progress", "done": 16, "total": 64, "unit": "items"},
    {"event": "of_a_newer_node", "x": 1},
    {"event": "progress", "done": 64, "total": 64, "unit": "items", "metrics": {"loss": 0.25}},
]
RESULT = {
    "ok": True,
    "model": "tiny",
    "items": [{"index": 0, "prompt": "Say\nhi", "output": "hi " * 100, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 2, "completion_tokens": 100, "latency_sec": 0.5},
}


@pytest.fixture
def place():
    """A folder for files and results, with a TMPDIR whose path is short enough for sockets."""
    folder = short_dir()
    (folder / "tmp").mkdir()
    yield folder
    shutil.rmtree(folder)


def write(place, name="task.yaml", *, hardware=None, **fake):
    document = {"spec": {"taskType": "inference", "fake": fake}}
    if hardware:
        document["spec"]["resources"] = {"hardware": hardware}
    (place / name).write_text(yaml.safe_dump(document))
    return name


def start(place, *arguments, mode=""):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(place / "tmp"), "FAKE_NODE": mode}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.kit.fake_run", *arguments],
        cwd=place,
        env={**env, "REDIS_URL": "redis://127.0.0.1:1/0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(place, *arguments, mode=""):
    process = start(place, *arguments, mode=mode)
    out, err = process.communicate(timeout=60)
    assert left(place) == []
    return process.returncode, out, err


def processes_of(place):
    """Every process with the test's folder as its working directory, or with the test's TMPDIR."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(place)) or process.environ().get("TMPDIR") == str(place / "tmp"):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [each for each in found if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def left(place):
    return [*(place / "tmp").iterdir(), *processes_of(place)]


def until(there, what):
    deadline = time.monotonic() + 30
    while not (found := there()):
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.02)
    return found


def test_a_task_from_start_to_end(place):
    code, out, err = run(place, write(place, events=EVENTS, result=RESULT), 'task_id="t1"')
    assert (code, err) == (0, "")
    assert out.splitlines()[:5] == [
        "starting the node",
        "t1  inference  task.yaml",
        "  load",
        "  generate",
        "  generate 20 % (16/64 items)",
    ]
    assert "  generate 100 % (64/64 items)  loss 0.25" in out.splitlines()
    assert "succeeded in 0.50 s" in out
    assert "1 item, 2 + 100 tokens (prompt + output), 0.50 s, tiny" in out
    assert "prompt  Say hi" in out
    assert out.splitlines()[-2].endswith("… (length)")
    assert out.splitlines()[-1] == f"results: {place}/results_workers/t1"
    message = json.loads((place / "results_workers/t1/message.json").read_text())
    assert message["assigned_worker"].startswith("local-")
    assert message["task_id"] == "t1"


def test_json_is_one_object_on_stdout(place):
    code, out, err = run(place, write(place, events=EVENTS, result=RESULT), "as_json=true", 'results_dir="here"')
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["ok"] is True
    assert said["result"] == RESULT
    assert said["runtime_sec"] == 0.5
    assert said["out_dir"] == f"{place}/here/{said['task_id']}"


def test_a_failure_is_one_line_and_code_1(place):
    code, out, err = run(place, write(place, error="spec.inference.top_p:\n must be at most 1", kind="bad_request"))
    assert code == 1
    assert err.startswith("flowmesh: task-")
    assert err.endswith(" failed (bad_request): spec.inference.top_p: must be at most 1\n")
    assert "logs: " in out
    code, out, err = run(place, write(place, error="no", kind="bad_request"), "as_json=true")
    assert code == 1
    assert json.loads(out)["verdict"] == "bad_request"
    assert err.count("\n") == 1


def test_several_files_stop_at_the_first_failure_unless_told(place):
    files = write(place, "a.yaml"), write(place, "b.yaml", error="no luck"), write(place, "c.yaml")
    code, out, err = run(place, *files)
    assert code == 1
    assert (out.count("succeeded"), "c.yaml" in out, err.count("no luck")) == (1, False, 1)
    code, out, err = run(place, *files, "keep_going=true")
    assert code == 1
    assert (out.count("succeeded"), "c.yaml" in out, err.count("no luck")) == (2, True, 1)
    shown = out.count("no luck")
    code, out, _ = run(place, *files, write(place, "d.yaml"), write(place, "e.yaml"), "keep_going=true")
    assert (code, out.count("succeeded"), out.count("no luck")) == (1, 4, shown), "once, and not before each later file"


def test_a_task_too_big_for_this_machine_is_not_sent(place):
    code, _, err = run(place, write(place, hardware={"gpu": {"count": 8}}))
    assert code == 1
    assert err == "flowmesh: task.yaml does not fit this machine: no GPU, needs 8\n"
    assert not (place / "results_workers").exists()


def test_ctrl_c_cancels(place):
    process = start(place, write(place, wait=True))
    until(lambda: list(place.glob("results_workers/*/waiting")), "the task is waiting")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "cancelling (repeat to kill)" in out
    assert err.count("\n") == 1
    assert "failed (cancelled): cancelled, forced False" in err
    assert left(place) == []


def test_ctrl_c_twice_forces(place):
    process = start(place, write(place, wait="stubborn"), mode="stubborn")
    until(lambda: list(place.glob("results_workers/*/waiting")), "the task is waiting")
    process.send_signal(signal.SIGINT)
    until(lambda: "cancelling" in process.stdout.readline(), "the first Ctrl-C is answered")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "forced True" in err
    assert left(place) == []


def test_sigterm_while_the_task_runs(place):
    process = start(place, write(place, wait=True))
    until(lambda: list(place.glob("results_workers/*/waiting")), "the task is waiting")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert left(place) == []


def test_a_timeout_cancels(place):
    code, _, err = run(place, write(place, wait=True), "timeout_s=0.3")
    assert code == 1
    assert "failed (cancelled): timeout after 0.3 s: cancelled, forced False" in err


def test_the_event_alone_is_enough(place):
    code, out, _ = run(place, write(place, silent=True))
    assert code == 0
    assert "succeeded" in out


def test_a_node_that_dies_is_told_with_its_log(place):
    code, _, err = run(place, write(place, die=7))
    assert code == 1
    *log, last = err.splitlines()
    assert log == ["node | the fake node begins", "node | about to die"]
    assert last.startswith("flowmesh: the node exited while task-")
    assert last.endswith("ran (exit code 7); its log is above")


def test_a_node_that_does_not_come_up(place):
    code, _, err = run(place, write(place), mode="crash")
    assert code == 1
    assert err.splitlines() == [
        "node | the fake node begins",
        "flowmesh: the node exited while it started (exit code 3); its log is above",
    ]


def test_a_wrong_setting_is_the_nodes_own_line(place):
    code, _, err = run(place, write(place), mode="refuse")
    assert (code, err) == (78, "flowmesh: conf.toml: redis.timeout_s: expected a number\n")


def test_what_the_node_leaves_is_ended(place):
    code, _, _ = run(place, write(place, child=True))
    assert code == 0
    [pid] = [int(path.read_text()) for path in place.glob("results_workers/*/child.pid")]
    assert linux.wait_gone(pid, 0)


def test_kill_9_leaves_no_process_and_the_next_run_no_folder(place):
    process = start(place, write(place, wait=True))
    until(lambda: list(place.glob("results_workers/*/waiting")), "the task is waiting")
    pids = [each.pid for each in processes_of(place)]
    assert len(pids) == 3  # flowmesh run, Redis and the node
    process.kill()
    process.communicate()
    for pid in pids:
        assert linux.wait_gone(pid, 10)
    assert len(list((place / "tmp").iterdir())) == 1
    code, _, _ = run(place, write(place))
    assert code == 0


def test_a_folder_in_use_is_not_swept(place):
    process = start(place, write(place, wait=True))
    until(lambda: list(place.glob("results_workers/*/waiting")), "the task is waiting")
    [folder] = (place / "tmp").iterdir()
    sweep_abandoned(RUN_PREFIX, place / "tmp")
    assert folder.is_dir()
    process.terminate()
    process.communicate(timeout=30)


def test_only_our_own_folders_are_swept(tmp_path):
    for name in ("flowmesh-run-old", "flowmesh-run-nolock", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "flowmesh-run-old" / "lock").touch()
    (tmp_path / "flowmesh-run-link").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "lock").touch()
    sweep_abandoned(RUN_PREFIX, tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"flowmesh-run-nolock", "flowmesh-run-link", "other"}
