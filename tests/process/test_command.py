"""Tasks of types command and python on a real node: every end, what is delivered, and what is left."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.cli.document_parser import parse
from tests.kit.paths import ROOT
from tests.kit.promises import CONFIG, ISOLATIONS, leaves, responses, wait_state
from tests.kit.support import Node, Orchestrator, RedisServer, alive, running, until

pytestmark = pytest.mark.redis

ALLOWED = """
[task_types.python]
environment = "light"
"""


@pytest.fixture(scope="module", params=ISOLATIONS)
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Node, Orchestrator]]:
    """One node for the whole module."""
    with contextlib.closing(RedisServer()) as server, contextlib.closing(Orchestrator(server)) as peer:
        options = (f"processes.isolation={request.param}", "tasks.allow_command=*", "tasks.read_roots=/tmp")
        node = Node(server, *(f"--set={each}" for each in options), config=CONFIG + ALLOWED)
        with running(node):
            yield node, peer
            assert node.process is not None
            assert node.process.poll() is None, node.text()
            assert "Traceback" not in node.text()


@pytest.fixture
def node(place: tuple[Node, Orchestrator]) -> Node:
    return place[0]


@pytest.fixture
def peer(place: tuple[Node, Orchestrator]) -> Orchestrator:
    return place[1]


def script(text: str, **fields: Any) -> dict[str, Any]:
    return {"taskType": "command", "script": text, **fields}


def result(node: Node, event: dict[str, Any]) -> dict[str, Any]:
    assert event["type"] == "TASK_SUCCEEDED", json.dumps(event)
    return responses(node, event["task_id"])


def failure(event: dict[str, Any]) -> dict[str, Any]:
    assert event["type"] == "TASK_FAILED", event
    return {**event["payload"], "error": event["error"]}


def test_a_program_with_all_it_has(node: Node, peer: Orchestrator) -> None:
    """Files, inputs, progress, metrics, a result, outputs of a pattern, and no standard input."""
    program = """
import json, os, pathlib, sys
from flowmesh.progress import report
assert report(phase="train")
for step in (1, 2): assert report(step, 2, "steps", loss=1 / step)
inputs = json.load(open(os.environ["FLOWMESH_INPUTS"]))
pathlib.Path("out/deep").mkdir(parents=True)
pathlib.Path("out/deep/a.bin").write_bytes(b"12345")
pathlib.Path("out/b.log").write_text("not this")
pathlib.Path(os.environ["FLOWMESH_OUTPUT_DIR"], "direct.txt").write_text("direct")
json.dump({"sum": sum(inputs["numbers"]), "args": sys.argv[1:]}, open(os.environ["FLOWMESH_RESULT"], "w"))
print(sys.stdin.read(), end="")
print(open("data/text.txt").read(), file=sys.stderr)
"""
    spec = {
        "taskType": "command",
        "command": ["python", "main.py", "--x", "a b"],
        "files": {"main.py": program, "data/text.txt": "some text"},
        "inputs": {"numbers": [1, 2, 3]},
        "outputs": ["out/**/*.bin"],
    }
    event = peer.run("w1", spec)
    said = result(node, event)
    assert said["result"] == {"sum": 6, "args": ["--x", "a b"]}
    assert said["outputs"] == [{"path": "out/deep/a.bin", "bytes": 5}]
    assert said["metrics"] == {"loss": 0.5}
    assert (said["stdout"], said["stderr"]) == ("", "some text\n")
    assert event["payload"]["command"] == {"code": 0, "signal": None}
    assert set(event["payload"]["phases"]) >= {"fetch", "run", "train", "save"}
    folder = node.results_dir / event["task_id"]
    assert (folder / "artifacts/out/deep/a.bin").read_bytes() == b"12345"
    assert (folder / "artifacts/direct.txt").exists()
    assert not (folder / "artifacts/out/b.log").exists()
    listed = (folder / "manifest.json").read_text()
    assert '"file_count": 2' in listed


@pytest.mark.parametrize(
    ("text", "how", "error"),
    [
        ("echo wrong >&2; exit 3", ("error", 3, None), "the program ended with exit status 3: wrong"),
        ("kill -SEGV $$", ("crash", None, "SIGSEGV"), "the program was killed by SIGSEGV"),
        ("echo 'MemoryError: no room' >&2; exit 1", ("host_oom", 1, None), "MemoryError: no room"),
        ("echo 'torch.OutOfMemoryError: CUDA out' >&2; exit 1", ("gpu_oom", 1, None), "torch.OutOfMemoryError"),
        ("false; echo not reached", ("error", 1, None), "the program ended with exit status 1"),
        ("echo '{' > $FLOWMESH_RESULT", ("error", 0, None), "FLOWMESH_RESULT names is not JSON"),
    ],
)
def test_a_program_that_fails(node: Node, peer: Orchestrator, text: str, how: tuple[Any, ...], error: str) -> None:
    event = peer.run("w1", script(text))
    found = failure(event)
    assert (found["error_kind"], found["command"]["code"], found["command"]["signal"]) == how
    assert error in found["error"]
    assert "Traceback" not in json.dumps(responses(node, event["task_id"]))


def test_an_output_that_is_missing_is_no_success(node: Node, peer: Orchestrator) -> None:
    found = failure(peer.run("w1", script("touch a", outputs=["a", "model/*.bin"])))
    assert "spec.outputs[1]" in found["error"]
    assert "model/*.bin" in found["error"]


def test_outputs_of_a_failed_program_are_kept(node: Node, peer: Orchestrator) -> None:
    event = peer.run("w1", script("echo half > half.txt; exit 1", outputs=["half.txt", "whole.txt"]))
    assert failure(event)["error_kind"] == "error"
    assert (node.results_dir / event["task_id"] / "artifacts/half.txt").read_text() == "half\n"


def test_bad_progress_harms_nobody(node: Node, peer: Orchestrator) -> None:
    """Lines without end, that are no JSON, or too many; the program never waits for the node."""
    text = """
printf '%70000s' x >&$FLOWMESH_PROGRESS_FD
echo '[1]' >&$FLOWMESH_PROGRESS_FD
echo '{"done": 1e400, "loss": "x", "ok": true}' >&$FLOWMESH_PROGRESS_FD
echo '{"done": 1, "acc": 0.5}' >&$FLOWMESH_PROGRESS_FD
"""
    said = result(node, peer.run("w1", script(text)))
    assert said["metrics"] == {"acc": 0.5}
    assert any("no JSON objects" in line for line in said["warnings"])


def test_a_cancel_gives_it_time_to_save(node: Node, peer: Orchestrator) -> None:
    """SIGTERM first; what it writes then is kept, and an exit status of 0 does not make it a success."""
    text = "trap 'echo saved > $FLOWMESH_CHECKPOINT_DIR/state; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    task_id = peer.dispatch("w1", script(text))
    log = node.results_dir / task_id / "logs/stdout.log"
    until(lambda: log.exists() and "ready" in log.read_text(), "the program runs")
    assert node.ask(op="cancel", task_id=task_id)["ok"]
    found = failure(peer.wait_end(task_id))
    assert found["error_kind"] == "cancelled"
    assert found["command"] == {"code": 0, "signal": None}
    assert (node.results_dir / task_id / "checkpoints/state").read_text() == "saved\n"


def test_a_program_that_ignores_sigterm_is_killed_with_what_it_started(node: Node, peer: Orchestrator) -> None:
    text = "trap '' TERM; sleep 300 & setsid sleep 301 & echo $! > pid; echo ready; wait"
    task_id = peer.dispatch("w1", script(text, timeoutSec=1))
    found = failure(peer.wait_end(task_id))
    assert found["error_kind"] == "timeout"
    escaped = int((node.results_dir / task_id / "work/pid").read_text())
    until(lambda: not alive(escaped), "what it started is gone", 5.0)


def test_what_a_successful_program_leaves_is_swept(node: Node, peer: Orchestrator) -> None:
    event = peer.run("w1", script("setsid sleep 300 & echo $! > pid"))
    assert result(node, event)["resources"]["processes_swept"] >= 1
    assert not alive(int((node.results_dir / event["task_id"] / "work/pid").read_text()))


def test_it_is_adopted_by_the_next_supervisor(node: Node, peer: Orchestrator) -> None:
    text = "while [ ! -e go ]; do sleep 0.05; done; echo done"
    task_id = peer.dispatch("w1", script(text))
    wait_state(node, task_id, "running")
    node.kill()
    node.start()
    until((node.results_dir / task_id / "work").is_dir, "its folder")
    (node.results_dir / task_id / "work/go").touch()
    assert result(node, peer.wait_end(task_id))["stdout"] == "done\n"


def test_an_archive_and_a_file_of_this_machine(node: Node, peer: Orchestrator, tmp_path: Path) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        member = tarfile.TarInfo("project/run.sh")
        member.size = len(b"cat own.txt\n")
        tar.addfile(member, io.BytesIO(b"cat own.txt\n"))
    (tmp_path / "project.tar.gz").write_bytes(data.getvalue())
    (tmp_path / "own.txt").write_text("from here\n")
    spec = {
        "taskType": "command",
        "command": ["sh", "run.sh"],
        "workdir": "project",
        "archive": {"path": str(tmp_path / "project.tar.gz")},
        "files": {"project/own.txt": {"path": str(tmp_path / "own.txt")}},
    }
    assert result(node, peer.run("w1", spec))["stdout"] == "from here\n"
    outside = {**spec, "files": {"a": {"path": "/etc/passwd"}}}
    assert "read_roots" in failure(peer.run("w1", outside))["error"]


def test_python_code_a_function_and_a_file(node: Node, peer: Orchestrator) -> None:
    code = {"taskType": "python", "code": "result = {'twice': [2 * x for x in inputs['x']]}", "inputs": {"x": [1, 2]}}
    assert result(node, peer.run("w1", code))["result"] == {"twice": [2, 4]}
    files = {"jobs.py": "def area(width, height=2):\n    return {'area': width * height}\n"}
    function = {"taskType": "python", "function": "jobs:area", "files": files, "inputs": {"width": 3}}
    assert result(node, peer.run("w1", function))["result"] == {"area": 6}
    wrong = failure(peer.run("w1", {**function, "inputs": {"depth": 3}}))
    assert "unexpected keyword argument 'depth'" in wrong["error"]
    assert "runners/command" not in "".join(wrong["log_tail"])
    early = {"taskType": "python", "code": "import sys\nresult = 3\nsys.exit()\nresult = 4"}
    assert result(node, peer.run("w1", early)).get("result") == 3
    nothing = failure(peer.run("w1", {"taskType": "python", "code": "result = object()"}))
    assert "cannot be written as JSON" in nothing["error"]


def test_a_group_of_ranks(node: Node, peer: Orchestrator) -> None:
    """torchrun starts one program for each rank, on the loopback interface; the first failure ends the group."""
    pytest.importorskip("torch")
    if "auto" not in node.args[0]:
        pytest.skip("the same in each isolation, and torchrun imports torch")
    text = "echo $RANK of $WORLD_SIZE $MASTER_ADDR; [ $$ -gt 1 ]; sleep 0.3; [ $RANK = 1 ] || sleep 300; exit 7"
    event = peer.run("w1", {"taskType": "command", "command": ["sh", "-c", text], "nproc_per_node": 2})
    assert failure(event)["error_kind"] == "error"
    lines = (node.results_dir / event["task_id"] / "logs/stdout.log").read_text().splitlines()
    assert sorted(lines) == ["0 of 2 127.0.0.1", "1 of 2 127.0.0.1"]


@pytest.mark.parametrize("name", ["command", "python"])
def test_the_examples_run_as_they_are(node: Node, peer: Orchestrator, name: str) -> None:
    spec = parse((ROOT / f"conf/tasks/{name}.yaml").read_text(), name, as_json=False)["spec"]
    said = result(node, peer.run("w1", spec))
    assert said["result"] == {"command": {"slope": 2.036}, "python": {"mean": 3.75, "stdev": 1.041}}[name]


def test_nothing_is_left(node: Node) -> None:
    """After all tests of this module."""
    status = node.ask(op="status")
    assert status["tasks"] == []
    until(lambda: not leaves(node), "no process of a task", 5.0)
    assert not list((node.state_dir / "tmp").iterdir())
    assert not list((node.state_dir / "spool").iterdir())


@pytest.mark.parametrize(
    ("allowed", "spec", "ok"),
    [
        ("/bin/echo *", {"taskType": "command", "command": ["/bin/echo", "hi"]}, True),
        ("/bin/echo *", {"taskType": "command", "command": ["/bin/sh", "-c", "/bin/echo hi"]}, False),
        ("/bin/echo *", {"taskType": "command", "script": "/bin/echo hi"}, False),
        ("math:*", {"taskType": "python", "function": "math:sqrt"}, True),
        ("math:*", {"taskType": "python", "function": "os:system"}, False),
        ("math:*", {"taskType": "python", "code": "pass"}, False),
    ],
)
def test_the_operators_patterns(allowed: str, spec: dict[str, Any], ok: bool) -> None:
    from flowmesh.messages.job import Job, Permits
    from runners.api import BadRequest, Context
    from runners.command.task import check_allowed, read_command, read_python

    job = Job(
        attempt=1, task_id="t", task_type=spec["taskType"], runner="", task={"spec": spec}, out_dir="/x",
        results_dir="/x", cache_dir="/x", tmp_dir="/x", permits=Permits(commands=(allowed,)),
    )  # fmt: skip
    ctx = Context(job)
    read = read_command if spec["taskType"] == "command" else read_python
    with contextlib.nullcontext() if ok else pytest.raises(BadRequest, match="allow_command"):
        check_allowed(ctx, read(ctx))


def test_both_types_are_off_by_default(orchestrator: Orchestrator, make_node: Any) -> None:
    make_node()
    found = failure(orchestrator.run("w1", script("true")))
    assert found["error_kind"] == "missing_dependency"
    assert "tasks.allow_command" in found["error"]
    assert "command" not in str(orchestrator.redis.hgetall("worker:w1"))
