"""`flowmesh run` with a real node: a new user's first steps, and what is left after Ctrl-C or `kill -9`."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.kit.batch_files import embedding, write
from tests.kit.paths import ROOT
from tests.kit.support import short_dir

pytestmark = pytest.mark.redis


@pytest.fixture
def place():
    folder = short_dir()
    (folder / "tmp").mkdir()
    (folder / "echo.yaml").write_text("spec: {taskType: echo, text: hello}\n")
    (folder / "slow.yaml").write_text("spec: {taskType: echo, delaySec: 600}\n")
    (folder / "wrong.yaml").write_text("spec: {taskType: eco}\n")
    yield folder
    assert processes_of(folder) == []
    shutil.rmtree(folder)


def start(place, *arguments, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(place / "tmp")}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(
        [sys.executable, "-m", "flowmesh.cli.main", "run", "--results-dir", str(place / "results"), *arguments],
        cwd=ROOT,
        env={**env, **options.pop("env", {})},
        **options,
    )


def run(place, *arguments):
    process = start(place, *(str(place / each) if each.endswith(".yaml") else each for each in arguments))
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def processes_of(place):
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(place) in word for word in (*process.cmdline(), *process.environ().values())):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [each for each in found if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def until(there, what):
    deadline = time.monotonic() + 60
    while not (found := there()):
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.02)
    return found


def test_an_echo(place):
    code, out, err = run(place, "echo.yaml", "--task-id", "first")
    assert (code, err) == (0, "")
    assert "succeeded in " in out
    assert re.search(r'^  echo +\{"taskType": "echo", "text": "hello"\}$', out, re.MULTILINE)
    assert out.endswith(f"results: {place}/results/first\n")
    assert json.loads((place / "results/first/responses.json").read_text())["echo"]["text"] == "hello"
    assert list((place / "tmp").iterdir()) == []


def test_two_files_on_one_node_as_json(place):
    code, out, err = run(place, "echo.yaml", "wrong.yaml", "--json")
    assert code == 1
    good, bad = map(json.loads, out.splitlines())
    assert good["ok"] is True
    assert good["result"]["echo"]["text"] == "hello"
    assert (bad["ok"], bad["verdict"], bad["worker_id"]) == (False, "bad_request", good["worker_id"])
    assert err.count("\n") == 1
    assert "eco" in err
    assert list((place / "tmp").iterdir()) == []


def test_batch_files(place):
    """One of chats and one of embeddings, of the same model."""
    pytest.importorskip("sentence_transformers", reason="needs the extra 'rag'")
    file = shutil.copy(ROOT / "conf/tasks/data/batch.jsonl", place)
    vectors = write(place / "vectors.jsonl", embedding("first"), embedding("second", ["a task", "the node"]))
    code, out, err = run(place, file, str(vectors), "--model", "builtin:tiny-llama", "--engine", "transformers")
    assert code == 0, err
    found = set()
    for line in out.splitlines():
        if line.startswith("output: "):
            output, lines = line.removeprefix("output: ").removesuffix(" lines)").rsplit(" (", 1)
            answers = Path(output).read_text().splitlines()
            assert len(answers) == int(lines)
            found.add(tuple(json.loads(answer)["custom_id"] for answer in answers))
    assert found == {("brief", "drawn", "continued"), ("first", "second")}


def test_ctrl_c(place):
    process = start(place, str(place / "slow.yaml"))
    until(lambda: "wait" in process.stdout.readline(), "the task is waiting")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "(cancelled)" in err
    assert err.count("\n") == 1
    assert list((place / "tmp").iterdir()) == []


def test_kill_9(place):
    process = start(place, str(place / "slow.yaml"))
    until(lambda: "wait" in process.stdout.readline(), "the task is waiting")
    assert len(processes_of(place)) >= 4  # flowmesh run, Redis, the node, its fork server, the task
    process.kill()
    process.communicate()
    until(lambda: not processes_of(place), "all its processes have ended")
    assert run(place, "echo.yaml")[0] == 0
    assert list((place / "tmp").iterdir()) == []


def test_on_a_terminal(place):
    """A live line is shown while it runs, and erased at the end."""
    near, far = pty.openpty()
    process = start(
        place,
        str(place / "echo.yaml"),
        stdin=far,
        stdout=far,
        stderr=far,
        text=False,
        env={"TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(far)
    said = b""
    while True:
        try:
            chunk = os.read(near, 65536)
        except OSError:  # the far end is closed
            break
        if not chunk:
            break
        said += chunk
    os.close(near)
    assert process.wait(60) == 0
    text = said.decode()
    assert "starting the node" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # the cursor is shown again
    last = text.rpartition("\x1b[2K")[2]
    assert "succeeded in " in last
    assert "results: " in last.splitlines()[-1]


@pytest.mark.parametrize("length", [60, 90])
def test_a_long_tmpdir_is_no_obstacle(place, length):
    """Sockets are created in a folder with a short path if TMPDIR is too long for them."""
    folder = place / ("x" * (length - len(str(place)) - 1))
    folder.mkdir()
    process = start(place, str(place / "echo.yaml"), env={"TMPDIR": str(folder)})
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "succeeded" in out
    assert list(folder.iterdir()) == []


CHECKED_MEANWHILE = """
import sys, time
from pathlib import Path
from flowmesh.cli import documents, locate
from flowmesh.cli.guard import guarded
from flowmesh.cli.local import LocalOptions
from flowmesh.cli.run import run_all, warm_at_start
from flowmesh.errors import FieldError
from flowmesh.tasks.catalogue import known_types
file, config, results, mark, fault = sys.argv[1:]

def check():
    end = time.monotonic() + 60
    while not Path(mark).exists():
        assert time.monotonic() < end, "nothing was imported while the document was checked"
        time.sleep(0.02)
    if fault:
        raise FieldError(fault, "")

submissions = [documents.load(file, "t-1")]
settings = warm_at_start(submissions, known_types(locate.settings(config)))
options = LocalOptions(config=config, results_dir=results, settings=settings)
sys.exit(guarded(lambda: run_all(submissions, options, check=check)))
"""


@pytest.mark.parametrize("fault", ["", "spec.text: not today"])
def test_libraries_are_imported_while_the_document_is_checked(place, fault):
    mark = place / "imported"
    (place / "marks_its_import.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (place / "node.toml").write_text(
        '[environments.own]\npreload = ["marks_its_import"]\n[task_types.echo]\nenvironment = "own"\n'
    )
    files = [str(place / name) for name in ("echo.yaml", "node.toml", "results", "imported")]
    env = {**os.environ, "PYTHONPATH": f"{place}:{ROOT}", "TMPDIR": str(place / "tmp")}
    done = subprocess.run(
        [sys.executable, "-c", CHECKED_MEANWHILE, *files, fault],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    if fault:
        assert done.returncode == 1
        assert fault in done.stderr
        assert not (place / "results").exists()
        assert list((place / "tmp").iterdir()) == []
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert "succeeded in " in done.stdout
