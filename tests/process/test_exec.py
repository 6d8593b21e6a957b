"""`flowmesh exec`: a command behaves as it does without it, on a node that runs here, with and without a fork."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh.cli.terminal import Terminal
from tests.kit.paths import ROOT
from tests.kit.promises import CONFIG, leaves
from tests.kit.support import Node, Orchestrator, RedisServer, alive, running, until

pytestmark = pytest.mark.redis

ALLOWED = """
[task_types.python]
environment = "light"
"""
FLOWMESH = (sys.executable, "-P", "-m", "flowmesh.cli.main", "exec", "-q")

MAIN = """
import argparse, atexit, logging, multiprocessing, os, sys, threading, time
from concurrent.futures import ProcessPoolExecutor
from helper import double

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
parser = argparse.ArgumentParser(prog="main")
parser.add_argument("--lr", type=float, required=True)

def late():
    time.sleep(0.1)
    print("a thread that is no daemon ends")

if __name__ == "__main__":
    args = parser.parse_args()
    print(sys.argv, args.lr, __name__, __file__, __spec__, os.path.relpath(sys.path[0]), sys.stdin.isatty())
    print([line.strip() for line in sys.stdin])
    logging.info("to stderr")
    for method in ("spawn", "fork"):
        with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
            print(method, list(pool.map(double, [1, 2])), sys.stdout.encoding)
    threading.Thread(target=late).start()
    atexit.register(print, "at exit")
    unclosed = open("unclosed.txt", "w")
    unclosed.write("written")
    sys.exit(3)
"""
FILES = {
    "main.py": MAIN,
    "helper.py": "def double(x):\n    return 2 * x\n",
    "pack/__init__.py": "",
    "pack/__main__.py": "from . import part\nimport sys\nprint(part.NAME, sys.argv[1:], __package__, __spec__.name)\n",
    "pack/part.py": "NAME = 'part'\n",
    "fails.py": "def inner():\n    return 1 / 0\n\n\ninner()\n",
    "syntax.py": "def\n",
    "text.py": "import sys\nsys.exit('a text as exit status')\n",
    "json_of_mine.py": "import flowmesh_is_not_here\n",
    "signals.py": ("import signal\nprint([signal.getsignal(n) for n in (2, 10, 13, 15, 17)])\n"),
}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with contextlib.closing(RedisServer()) as server:
        node = Node(server, "--set=tasks.allow_command=*", config=CONFIG + ALLOWED)
        # What libraries read when they are imported is compared. Other tests of this process change os.environ later.
        node.env |= {name: value for name, value in os.environ.items() if name.startswith("HF_")}
        with running(node):
            yield node
            until(lambda: not leaves(node), "no process of a task", 5.0)
            assert node.process is not None
            assert node.process.poll() is None, node.text()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def environment(node: Node) -> dict[str, str]:
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= {name: value for name, value in node.env.items() if name.startswith("HF_")}
    (node.home / "t").mkdir(exist_ok=True)
    return env | {"PYTHONPATH": str(ROOT), "TMPDIR": str(node.home / "t")}


def call(node: Node, project: Path, command: list[str], stdin: str) -> tuple[int, str, str]:
    (project / "unclosed.txt").unlink(missing_ok=True)
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        cwd=project,
        env=environment(node),
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def under(node: Node, *options: str) -> list[str]:
    return [*FLOWMESH, "--config", str(node.home / "exec.toml"), *options, "--"]


@pytest.fixture(scope="module", autouse=True)
def settings(node: Node) -> None:
    (node.home / "exec.toml").write_text(f'[node]\nstate_dir = "{node.state_dir}"\n')


@pytest.mark.parametrize(
    "program",
    [
        ["main.py", "--lr", "1e-4"],
        ["main.py"],
        ["-m", "pack", "a b"],
        ["-c", "import sys; print(sys.argv, __name__); sys.exit(sys.stdin.read())", "x"],
        ["fails.py"],
        ["syntax.py"],
        ["text.py"],
        ["json_of_mine.py"],
        ["signals.py"],
        ["no such file.py"],
        ["-X", "utf8", "-c", "import sys; print(sys.flags.utf8_mode)"],
    ],
    ids=" ".join,
)
def test_a_script_behaves_alike(node: Node, project: Path, program: list[str]) -> None:
    """Exit status, output and errors: of Python by itself, under exec, and in a fork of a server."""
    command = [sys.executable, *program]
    plain = call(node, project, command, "line 1\nline 2\n")
    wrote = (project / "unclosed.txt").exists()
    for options in ([], ["--preload", "json"]):
        found = call(node, project, [*under(node, *options), *command], "line 1\nline 2\n")
        assert found[:2] == plain[:2], options
        lines = [line for line in found[2].splitlines() if not line.startswith("flowmesh exec: warning")]
        assert lines == plain[2].splitlines(), options
        assert not wrote or (project / "unclosed.txt").read_text() == "written"


def test_what_cannot_run_in_a_fork_is_told(node: Node, project: Path, tmp_path: Path) -> None:
    """A module of the program that has the name of an imported library, and an option of the interpreter's start."""
    (tmp_path / "msgspec.py").write_text("print('mine')\n")
    (tmp_path / "main.py").write_text("import msgspec\n")
    for command, why in (
        ([sys.executable, "main.py"], "has modules that libraries here are named like: msgspec"),
        ([sys.executable, "-O", "main.py"], "the option -O is for the interpreter's start"),
    ):
        code, out, err = call(node, tmp_path, [*under(node, "--preload", "json"), *command], "")
        assert (code, out) == (0, "mine\n"), err
        assert f"started as a new interpreter, without preloaded libraries: {tmp_path if 'has' in why else ''}" in err
        assert why in err


def test_exit_statuses(node: Node, project: Path, tmp_path: Path) -> None:
    """As of a shell; and 124 for the timeout, as of timeout(1)."""
    report = tmp_path / "report.json"
    for command, options, code, said in (
        (["sh", "-c", "exit 7"], [], 7, ""),
        (["sh", "-c", "kill -KILL $$"], [], 128 + signal.SIGKILL, "was killed by SIGKILL"),
        (["no-such-program"], [], 127, "there is no program 'no-such-program' in PATH"),
        (["./main.py"], [], 126, "'./main.py' may not be executed"),
        (["sleep", "60"], ["--timeout", "0.3"], 124, "timed out"),
    ):
        found = call(node, project, [*under(node, *options, "--report", str(report)), *command], "")
        assert found[0] == code, (command, found)
        assert said in found[2]
        assert json.loads(report.read_text())["ok"] is False


def pressed(node: Node, project: Path, *options: str, program: str, times: int = 1) -> tuple[int, str]:
    """Run a program in a terminal, press Ctrl-C once it says ready; returns exit status and output."""
    main, peer = pty.openpty()
    process = subprocess.Popen(
        [*under(node, *options), sys.executable, "-u", "-c", program],
        stdin=peer, stdout=peer, stderr=peer, cwd=project, env=environment(node), start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - one thread
    )  # fmt: skip
    os.close(peer)
    seen = b""
    try:
        with contextlib.suppress(OSError):  # the terminal is closed at the end
            while data := os.read(main, 4096):
                seen += data
                if times and b"ready" in seen and seen.endswith(b"\n"):
                    times -= 1
                    os.write(main, b"\x03")
        return process.wait(60), seen.decode()
    finally:
        os.close(main)
        process.kill()
        process.wait()


@pytest.mark.parametrize("options", [(), ("--preload", "json")], ids=["plain", "fork"])
def test_ctrl_c_is_the_programs(node: Node, project: Path, options: tuple[str, ...]) -> None:
    """It gets a SIGINT, and only that; it sees a terminal."""
    program = (
        "import os, sys, time\n"
        "try:\n"
        "    print('ready', os.isatty(0), os.isatty(1), flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    print('saved'); sys.exit(5)\n"
    )
    code, seen = pressed(node, project, *options, program=program)
    assert "ready True True" in seen
    assert "saved" in seen
    assert code == 5


def test_when_exec_is_killed_its_program_ends(node: Node, project: Path) -> None:
    command = [*under(node), "sh", "-c", "echo $$; exec sleep 300"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=project, env=environment(node))
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    until(lambda: not alive(pid), "the program is gone", 10.0)
    assert call(node, project, [*under(node), "true"], "")[0] == 0
    assert list((node.home / "t").iterdir()) == [], "the next one removes the folder of the killed one"


def test_a_second_command_waits_for_the_slot(node: Node, project: Path) -> None:
    first = subprocess.Popen(
        [*under(node), "sh", "-c", "echo ready; read line"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=project, env=environment(node),
    )  # fmt: skip
    assert first.stdin is not None
    assert first.stdout is not None
    assert first.stdout.readline() == "ready\n"
    quiet = [each for each in under(node) if each != "-q"]
    second = subprocess.Popen(
        [*quiet, "echo", "second"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=project,
        env=environment(node),
    )  # fmt: skip
    assert second.stderr is not None
    assert "waiting for w1: 1 task before this one" in second.stderr.readline()
    first.stdin.write("\n")
    first.stdin.close()
    assert first.wait(30) == 0
    first.stdout.close()
    out, err = second.communicate(timeout=30)
    assert (out, second.returncode) == ("second\n", 0)
    assert "exit status 0 in" in err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run tasks as another user")
def test_where_tasks_run_as_another_user(redis_server: RedisServer, project: Path) -> None:
    """The terminal is given to that user and nobody else; a folder that the user may not enter is named."""
    settings = 'task_user = "nobody"\n'
    config = CONFIG.replace("[processes]\n", "[processes]\n" + settings)
    node = Node(redis_server, "--set=tasks.allow_command=*", config=config)
    node.home.chmod(0o711)
    (node.home / "exec.toml").write_text(f'[node]\nstate_dir = "{node.state_dir}"\n[processes]\n{settings}')
    with running(node):
        begin = [*FLOWMESH, "--config", str(node.home / "exec.toml"), "--"]
        found = call(node, Path("/"), [*begin, "sh", "-c", "id -un; echo $HOME; cat; exit 4"], "typed\n")
        assert found[:2] == (4, "nobody\n/nonexistent\ntyped\n"), found
        closed = node.home / "closed"
        closed.mkdir(mode=0o700)
        code, _, errors = call(node, closed, [*begin, "true"], "")
        assert code == 1
        assert f"may not enter {closed}" in errors


def test_the_operators_patterns_are_for_what_runs(
    redis_server: RedisServer, orchestrator: Orchestrator, tmp_path: Path
) -> None:
    """Not for what the document says: a caller brings a command line of its own."""
    node = Node(redis_server, "--set=tasks.allow_command=/bin/echo *", config=CONFIG + ALLOWED)
    with running(node), Terminal(("/bin/sh", "-c", f"touch {tmp_path}/ran")) as terminal:
        spec = {"taskType": "command", "command": ["/bin/echo", "hi"], "attach": str(terminal.path)}
        end = orchestrator.run("w1", spec)
        assert end["payload"]["error_kind"] == "bad_request"
        assert "tasks.allow_command" in end["error"]
        assert not (tmp_path / "ran").exists()
        assert orchestrator.run("w1", {**spec, "attach": None})["type"] == "TASK_SUCCEEDED"
