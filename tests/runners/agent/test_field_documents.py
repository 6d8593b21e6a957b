"""Agents' documents as users have them: configurations in folders, batches with their files, declared artifacts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("smolagents", reason="needs the extra 'agent'")
import yaml

from flowmesh.results.job import Target
from flowmesh.results.task_folder import TaskFolder
from runners.agent.config_files import known_names
from runners.agent.runner import AgentRunner
from runners.api import BadRequest, RunnerError
from tests.kit.agent_support import agent_context, run_agent
from tests.kit.openai_server import Fail, Server, answer
from tests.kit.paths import CONF


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    """What an operator may put there, and a file beside it that no name may reach."""
    (tmp_path / "outside.yaml").write_text("description: outside")
    folder = tmp_path / "agents"
    for name in ("examples/search_agent", "examples/deep/er", "v1.2", "with space"):
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"extends": "test", "description": name}))
    (folder / "short.yml").write_text("extends: test")
    for name in (
        "_scripts/primes.yaml",
        ".git/config.yaml",
        "examples/_part.yaml",
        "search_providers.yaml",
        "notes.txt",
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    return folder


FOUND = ["examples/deep/er", "examples/search_agent", "short", "test", "v1.2", "with space"]


@pytest.mark.parametrize("name", [*FOUND, "examples/search_agent.yaml", "short.yml"])
def test_what_the_operator_put_there_is_found(name, agents, make_context) -> None:
    with Server(answer("found")).running() as server:
        ran = run_agent(make_context, agents, server.url, spec={"configName": name})
    assert ran.output == "found"
    assert known_names(agents) == FOUND


@pytest.mark.parametrize(
    "name",
    ["../outside", "examples/../../outside", "/etc/passwd", ".", "..", "./test", "examples", "examples/", "//test",
     "_scripts/primes", ".git/config", "examples/_part", "search_providers", "notes", "notes.txt", "x\0y", "Test",
     "examples\\search_agent", ".yaml", "x" * 5000],
)  # fmt: skip
def test_other_names_are_refused_with_those_there_are(name, agents, make_context) -> None:
    with pytest.raises(BadRequest) as caught:
        run_agent(
            make_context, agents, "http://127.0.0.1:1/v1", spec={"configName": name} if name else {"configName": "x"}
        )
    assert "unknown agent configuration" in str(caught.value)
    assert f"known: {', '.join(FOUND)}" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_name_without_its_folder_is_suggested(agents, make_context) -> None:
    with pytest.raises(BadRequest, match=r"did you mean 'examples/search_agent'\?"):
        run_agent(make_context, agents, "http://127.0.0.1:1/v1", spec={"configName": "search_agent"})
    with pytest.raises(BadRequest, match=r"test.extends: unknown agent configuration '../outside'"):
        run_agent(make_context, agents, "http://127.0.0.1:1/v1", config={"extends": "../outside"})


def test_links_to_folders_are_followed_once(agents, tmp_path, make_context) -> None:
    """A mounted ConfigMap: `..data` is a link to the present version, and every entry a link into it."""
    data = agents / "..2026" / "nested"
    data.mkdir(parents=True)
    (data / "one.yaml").write_text("extends: test")
    (agents / "..data").symlink_to("..2026")
    (agents / "nested").symlink_to("..data/nested")
    (agents / "loop").symlink_to(agents)
    (agents / "broken.yaml").symlink_to("nowhere.yaml")
    with Server(answer("found")).running() as server:
        assert run_agent(make_context, agents, server.url, spec={"configName": "nested/one"}).output == "found"
    assert known_names(agents) == sorted([*FOUND, "nested/one"])


def test_a_folder_that_is_not_there_is_named(make_context, tmp_path) -> None:
    ctx = make_context({"task": "x"}, task_type="agent", limits={"agents_dir": str(tmp_path / "absent")})
    with pytest.raises(BadRequest, match=r"there are none in .*absent \(runners.agents_dir\)"):
        AgentRunner().run(ctx)


def test_the_name_that_documents_carry_is_shipped() -> None:
    assert "examples/search_agent" in known_names(CONF / "agents")


def decide(body: dict[str, Any]) -> Any:
    task = body["messages"][1]["content"]
    return Fail(400, '{"error": {"message": "too long"}}') if "broken" in task else answer(f"did {task}")


def test_a_batch_writes_a_file_for_each_item_and_a_summary(agents, make_context) -> None:
    data = {"type": "list", "items": ["one", "broken", "three"]}
    declared = ["batch_logs/task_1_output.txt", "batch_logs/task_2_output.txt", "batch_logs", "batch_summary.json",
                "agent_output.txt", "execution_log.jsonl", "report.md"]  # fmt: skip
    with Server(decide=decide).running() as server:
        ran = run_agent(make_context, agents, server.url, spec={"data": data})
    folder = ran.ctx.out_dir
    assert (folder / "batch_logs/task_1_output.txt").read_text() == "did one\n"
    assert "too long" in (folder / "batch_logs/task_2_output.txt").read_text()
    assert (folder / "batch_logs/task_3_output.txt").read_text() == "did three\n"
    summary = json.loads((folder / "batch_summary.json").read_text())
    assert summary == {"total": 3, "total_tasks": 3, "completed": 2, "failed": 1, "failed_items": [1]}
    assert ran.result["metadata"]["batch_summary"] == summary
    (folder / "leads-out").symlink_to("/etc/passwd")
    target = Target(task_id="t", out_dir=str(folder), artifacts=(*declared, "leads-out"))
    with contextlib.closing(TaskFolder(target)) as task:
        task.write_manifest({})
    manifest = json.loads((folder / "manifest.json").read_text())
    entries = {entry["path"]: entry for entry in manifest["entries"]}
    assert {entries[path]["status"] for path in declared[:-1]} == {"present"}
    assert entries["report.md"]["status"] == "missing"
    assert entries["report.md"]["reason"] == "the task wrote no such file or folder"
    assert entries["leads-out"]["status"] == "missing"
    assert entries["leads-out"]["reason"]


def test_a_batch_that_fails_leaves_what_it_had(agents, make_context) -> None:
    data = {"type": "list", "items": ["broken", "broken too"]}
    with Server(decide=decide).running() as server:
        ctx = agent_context(make_context, agents, server.url, spec={"data": data})
        with pytest.raises(RunnerError, match="all 2 runs failed"):
            AgentRunner().run(ctx)
    assert sorted(path.name for path in (ctx.out_dir / "batch_logs").iterdir()) == [
        "task_1_output.txt", "task_2_output.txt",
    ]  # fmt: skip
    assert json.loads((ctx.out_dir / "batch_summary.json").read_text())["failed"] == 2


def test_one_task_writes_no_batch(agents, make_context) -> None:
    with Server(answer("x")).running() as server:
        ran = run_agent(make_context, agents, server.url)
    assert not (ran.ctx.out_dir / "batch_logs").exists()
    assert not (ran.ctx.out_dir / "batch_summary.json").exists()
