"""The agent runner against an endpoint that the test speaks for: turns, tools, limits, failures, cancel, secrets."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("smolagents", reason="needs the extra 'agent'")
import yaml

from flowmesh.processes.pipe import Cancel, Pipe, Progress
from runners.agent.runner import AgentRunner
from runners.api import BadRequest, Cancelled, RunnerError
from tests.kit.agent_support import agent_context, log_of, run_agent
from tests.kit.openai_server import (
    Break,
    Fail,
    Hang,
    Raw,
    Say,
    Server,
    answer,
    call,
)
from tests.kit.paths import ROOT

KEY = "sk-test-7c1d-do-not-show"
FILES = {"tools": {"files": True}}


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    return tmp_path / "agents"


@pytest.fixture
def pipes() -> Iterator[tuple[Pipe, Pipe]]:
    """The node's end and the task's."""
    pair = Pipe.pair()
    yield pair
    for each in pair:
        each.close()


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_and_their_results_told_back(stream, agents, make_context) -> None:
    steps = [
        call("write_file", path="notes/a.txt", content="forty-two {äö}"),
        Say("I will look.", (("read_file", {"path": "notes/a.txt"}), ("list_files", {}))),
        answer("It says forty-two."),
    ]
    with Server(*steps).running() as server:
        ran = run_agent(make_context, agents, server.url, config={**FILES, "model": {"stream": stream}})
    assert ran.output == "It says forty-two."
    assert ran.result["ok"] is True
    assert ran.result["model"] == "test-model"
    item = dict(ran.items[0])
    assert item.pop("execution_time_sec") > 0
    assert item == {"index": 0, "output": "It says forty-two.", "finish_reason": "completed"}
    usage = ran.result["usage"]
    assert usage.pop("execution_time_sec") > 0
    assert usage == {
        "num_requests": 1, "agent_config": "test", "model_requests": 3, "tool_calls": 3, "prompt_tokens": 30,
        "completion_tokens": 15, "total_tokens": 45,
    }  # fmt: skip
    assert ran.result["metadata"]["task"] == "do it"
    assert (ran.ctx.out_dir / "agent_output.txt").read_text() == "It says forty-two.\n"
    assert (ran.ctx.out_dir / "workspace" / "notes" / "a.txt").read_text() == "forty-two {äö}"
    first, _, last = server.requests
    assert {tool["function"]["name"] for tool in first.body["tools"]} == {
        "read_file", "write_file", "list_files", "final_answer",
    }  # fmt: skip
    assert first.body["tool_choice"] == "auto"
    assert [message["role"] for message in first.body["messages"]] == ["system", "user"]
    assert first.body["messages"][1]["content"] == "do it"
    said = last.body["messages"][-3]
    assert said["content"] == "I will look."
    assert [each["function"]["name"] for each in said["tool_calls"]] == ["read_file", "list_files"]
    assert json.loads(said["tool_calls"][0]["function"]["arguments"]) == {"path": "notes/a.txt"}
    assert "forty-two {äö}" in last.results[1]
    assert "notes/a.txt (" in last.results[2]
    ids = [message["tool_call_id"] for message in last.body["messages"][-2:]]
    assert ids == [each["id"] for each in said["tool_calls"]]


def test_the_log_has_every_step_in_order_as_it_happens(agents, make_context) -> None:
    seen: list[list[str]] = []

    def decide(body: dict[str, Any]) -> Any:
        path = ctx.out_dir / "execution_log.jsonl"
        seen.append([json.loads(line)["event"] for line in path.read_text().splitlines()])
        return [call("list_files"), answer("done")][len(seen) - 1]

    with Server(decide=decide).running() as server:
        ctx = agent_context(make_context, agents, server.url, config=FILES)
        result = AgentRunner().run(ctx)
    assert seen[0] == ["task"]
    assert seen[1] == ["task", "model", "tool_call", "tool_result"]
    log = log_of(ctx)
    assert [entry["event"] for entry in log] == [*seen[1], "model", "answer"]
    assert result["metadata"]["execution_log"] == log
    assert log[2]["tool"] == "list_files"
    assert all(entry["item"] == 0 and entry["agent"] == "agent" for entry in log)


def test_steps_are_progress(pipes, agents, make_context) -> None:
    near, far = pipes
    steps = [call("list_files"), call("list_files"), answer("x")]
    with Server(*steps).running() as server:
        run_agent(make_context, agents, server.url, config=FILES, pipe=far)
    frames = []
    while near.wait(0):
        frames.append(near.poll())
    assert any(isinstance(frame, Progress) and frame.unit == "steps" for frame in frames)


WRITTEN = '{"name": "final_answer", "arguments": {"answer": "Paris."}}'


@pytest.mark.parametrize("text", ["Paris.", WRITTEN, f"```json\n{WRITTEN}\n```"])
def test_text_without_a_call_is_the_answer(text, agents, make_context) -> None:
    with Server(Say(text)).running() as server:
        assert run_agent(make_context, agents, server.url).output == "Paris."


def test_a_model_without_tool_calls_writes_them(agents, make_context) -> None:
    steps = [Say('I write.\n{"name": "write_file", "arguments": {"path": "a", "content": "b"}}'), Say("All done.")]
    with Server(*steps).running() as server:
        ran = run_agent(make_context, agents, server.url, config={**FILES, "model": {"tool_choice": "none"}})
        assert ran.output == "All done."
        assert "tools" not in server.requests[0].body
        assert "write_file" in server.requests[0].body["messages"][0]["content"]
        assert "a written" in server.requests[1].body["messages"][-1]["content"]
    assert (ran.ctx.out_dir / "workspace" / "a").read_text() == "b"


def test_a_tool_that_fails_is_told_and_the_run_goes_on(agents, make_context) -> None:
    steps = [
        call("read_file", path="../../secret"),
        call("no_such_tool"),
        call("read_file", wrong="x"),
        Say(calls=(("read_file", "{not json"),)),
        answer("I could not."),
    ]
    with Server(*steps).running() as server:
        ran = run_agent(make_context, agents, server.url, config=FILES)
        assert "is not in the task's folder" in server.requests[1].results[0]
        assert "Unknown tool no_such_tool" in server.requests[2].results[1]
    assert ran.output == "I could not."
    assert len(ran.events("error")) == 4


def test_all_the_same_ids_do_no_harm(agents, make_context) -> None:
    both = Say(
        calls=(("write_file", {"path": "a", "content": "1"}), ("write_file", {"path": "b", "content": "2"})),
        ids=("call_same", "call_same"),
    )
    with Server(both, answer("x")).running() as server:
        ran = run_agent(make_context, agents, server.url, config=FILES)
        assert server.requests[1].results == ["a written", "b written"]
    assert {each.name for each in (ran.ctx.out_dir / "workspace").iterdir()} == {"a", "b"}


def test_each_call_of_a_turn_has_its_own_result(agents, make_context) -> None:
    """In the order of the calls: not of their ids, nor of who is done first. One that fails is no other's failure."""
    calls = (
        ("shell", {"command": "sleep 0.5; echo one"}),
        ("read_file", {"path": "absent"}),
        ("no_such_tool", {}),
        ("shell", {"command": "echo four"}),
    )
    several = Say(calls=calls, ids=("call_z", "call_c", "call_d", "call_a"))
    with Server(several, call("read_file", path="absent"), answer("x")).running() as server:
        ran = run_agent(make_context, agents, server.url, config={"tools": {"files": True, "shell": True}})
        results = server.requests[1].results
        told = [message for message in server.requests[1].body["messages"] if message["role"] == "tool"]
        alone = server.requests[2].results[-1]
    assert [message["tool_call_id"] for message in told] == ["call_z", "call_c", "call_d", "call_a"]
    assert [results[0], results[3]] == ["one", "four"]
    assert results[1] == alone
    assert alone.startswith("Error: Error executing tool 'read_file'")
    assert results[2].startswith("Error: Unknown tool no_such_tool")
    assert [(entry["tool"], entry["result"]) for entry in ran.events("tool_result")] == [
        ("shell", "one"), ("read_file", results[1]), ("no_such_tool", results[2]), ("shell", "four"),
    ]  # fmt: skip
    assert [entry["tool"] for entry in ran.events("tool_call")] == [*(name for name, _ in calls), "read_file"]
    assert [entry["turn"] for entry in ran.events("error")] == [2]  # the turn whose only call failed


def test_an_answer_among_other_calls_is_refused_and_their_results_are_kept(agents, make_context) -> None:
    calls = (
        ("final_answer", {"answer": "too early"}),
        ("write_file", {"path": "a", "content": "b"}),
        ("final_answer", {"wrong": "x"}),
    )
    with Server(Say(calls=calls), answer("x")).running() as server:
        ran = run_agent(make_context, agents, server.url, config=FILES)
        results = server.requests[1].results
    assert ran.output == "x"
    assert "please do not perform any other tool calls" in results[0]
    assert results[1] == "a written"
    assert results[2].startswith("Error: Argument wrong is not in")
    assert [entry["result"] for entry in ran.events("tool_result")] == [results[1], results[2]]


@pytest.mark.parametrize("nothing", [None, "", " \n", []])
def test_an_empty_answer_is_none(nothing, agents, make_context) -> None:
    empty = call("final_answer", answer=nothing)
    with Server(empty, answer("42")).running() as server:
        ran = run_agent(make_context, agents, server.url)
        assert ran.output == "42"
        assert "the answer is empty" in server.requests[1].results[0]
    with Server(empty, empty, Say("")).running() as server:
        ctx = agent_context(make_context, agents, server.url, config={"max_turns": 2}, task_id="never")
        with pytest.raises(RunnerError, match="max_turns: no answer after 2 turns"):
            AgentRunner().run(ctx)


def test_running_out_of_turns_fails_the_item_and_keeps_what_there_is(agents, make_context) -> None:
    def decide(body: dict[str, Any]) -> Any:
        return call("list_files") if "tools" in body else Say("As far as I got: two.")

    with Server(decide=decide).running() as server:
        ctx = agent_context(make_context, agents, server.url, config={**FILES, "max_turns": 2})
        with pytest.raises(RunnerError, match="max_turns: no answer after 2 turns") as caught:
            AgentRunner().run(ctx)
    assert not isinstance(caught.value, BadRequest)
    assert (ctx.out_dir / "agent_output.txt").read_text() == "As far as I got: two.\n"
    assert len(server.requests) == 3


def test_the_timeout_ends_a_run_that_waits(agents, make_context) -> None:
    with Server(Hang()).running() as server:
        ctx = agent_context(make_context, agents, server.url, spec={"agent": {"timeout": 0.3}})
        with pytest.raises(RunnerError, match=r"timeout: it took more than 0.3 s"):
            AgentRunner().run(ctx)


@pytest.mark.parametrize("calls", [1, 2])
def test_the_timeout_ends_a_tool_that_works(calls, agents, make_context) -> None:
    step = Say(calls=(("shell", {"command": "sleep 60"}),) * calls)
    with Server(step, answer("x")).running() as server:
        ctx = agent_context(
            make_context, agents, server.url, config={"tools": {"shell": True}}, spec={"agent": {"timeout": 1}}
        )
        with pytest.raises(RunnerError, match="timeout"):
            AgentRunner().run(ctx)
    assert len(server.requests) == 1


def sleepers() -> list[psutil.Process]:
    """Commands of this test that run."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "sleep":
                found.append(process)
    return found


@pytest.mark.parametrize("where", ["endpoint", "shell", "two shells"])
def test_a_cancel_is_heard_while_waiting(where, pipes, agents, make_context) -> None:
    near, far = pipes
    wait = ("shell", {"command": "sleep 600"})
    step = {"endpoint": Hang(), "shell": Say(calls=(wait,)), "two shells": Say(calls=(wait, wait))}[where]
    with Server(step).running() as server:
        ctx = agent_context(make_context, agents, server.url, config={"tools": {"shell": True}}, pipe=far)

        def cancel() -> None:
            server.asked.wait(60)
            while where != "endpoint" and not sleepers():  # what it writes is in its folder when it has ended
                time.sleep(0.02)
            near.send(Cancel("enough"))

        listener = threading.Thread(target=cancel)
        listener.start()
        with pytest.raises(Cancelled, match="enough"):
            AgentRunner().run(ctx)
        listener.join()


def test_each_item_is_a_run_of_its_own_and_one_failure_is_its_own(agents, make_context) -> None:
    def decide(body: dict[str, Any]) -> Any:
        task = body["messages"][1]["content"]
        if "broken" in task:
            return Fail(400, '{"error": {"message": "too long"}}')
        if len(body["messages"]) == 2:
            return call("write_file", path="who.txt", content=task)
        return answer(f"did {task}")

    data = {"type": "list", "items": ["one", "broken", "three"], "metadata": [{"id": 1}, None, {"id": 3}]}
    with Server(decide=decide).running() as server:
        ran = run_agent(make_context, agents, server.url, config=FILES, spec={"data": data})
    assert [item["finish_reason"] for item in ran.items] == ["completed", "failed", "completed"]
    assert [item["output"] for item in ran.items] == ["did one", "", "did three"]
    assert "answered 400" in ran.items[1]["error"]
    assert "too long" in ran.items[1]["error"]
    assert [item.get("metadata") for item in ran.items] == [{"id": 1}, None, {"id": 3}]
    metadata = ran.result["metadata"]
    assert metadata["tasks_count"] == 3
    assert metadata["batch_summary"] == {"total": 3, "total_tasks": 3, "completed": 2, "failed": 1, "failed_items": [1]}
    assert ran.result["usage"]["num_requests"] == 3
    assert (ran.ctx.out_dir / "workspace" / "0002" / "who.txt").read_text() == "three"
    text = (ran.ctx.out_dir / "agent_output.txt").read_text()
    assert "## 0 (completed)\n\ndid one" in text
    assert "## 1 (failed)" in text


def test_all_failed_is_a_failed_task(agents, make_context) -> None:
    with Server(decide=lambda _: Fail(400, "{}")).running() as server:
        ctx = agent_context(make_context, agents, server.url, spec={"data": {"type": "list", "items": ["a", "b"]}})
        with pytest.raises(RunnerError, match=r"all 2 runs failed; the first: .*answered 400"):
            AgentRunner().run(ctx)


def test_static_data_and_shards(agents, make_context) -> None:
    with Server(decide=lambda body: answer(body["messages"][1]["content"])).running() as server:
        ran = run_agent(make_context, agents, server.url, spec={"data": {"type": "static", "task": "think"}})
        assert ran.output == "think"
        assert ran.result["metadata"]["task"] == "think"
        spec = {"data": {"type": "list", "items": ["a", "b", "c"]}, "shard": {"index": 1, "total": 3}}
        assert run_agent(make_context, agents, server.url, spec=spec).output == "b"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("trouble", [Fail(503, "busy"), Fail(429, "", {"Retry-After": "0.01"}), Break()])
def test_passing_troubles_are_tried_again(trouble, stream, agents, make_context) -> None:
    with Server(trouble, answer("in the end")).running() as server:
        ran = run_agent(make_context, agents, server.url, config={"model": {"retries": 2, "stream": stream}})
        assert ran.output == "in the end"
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (Fail(404, '{"error": {"message": "no such model"}}'), "answered 404 Not Found: no such model"),
        (Fail(500, "<html>oops</html>"), "answered 500"),
        (Break(), "broke"),
        (Raw(b"no json"), "an answer that is not a chat completion"),
        (Raw(b'{"choices": []}'), "an answer without choices"),
        (Fail(302, "", {"Location": "http://127.0.0.1:1/"}), "answered 302"),
    ],
)
def test_lasting_troubles_name_the_endpoint(trouble, said, agents, make_context) -> None:
    with Server(trouble).running() as server:
        ctx = agent_context(make_context, agents, server.url)
        with pytest.raises(RunnerError) as caught:
            AgentRunner().run(ctx)
    assert said in str(caught.value)
    assert f"the model endpoint {server.url}" in str(caught.value)


def test_an_endpoint_that_is_not_there(agents, make_context) -> None:
    with Server().running() as server:
        gone = server.url
    with pytest.raises(RunnerError, match="cannot be reached"):
        run_agent(make_context, agents, gone)


def test_the_request_has_what_the_configuration_says(agents, make_context) -> None:
    model = {"name": "big", "temperature": 0.1, "max_tokens": 77, "seed": 5, "top_p": 0.5, "tool_choice": "required"}
    model |= {"extra": {"chat_template_kwargs": {"thinking": False}}, "headers": {"X-Team": "blue-team"}}
    config = {"model": model, "instructions": "Speak like a pirate."}
    with Server(answer("The blue-team it is.")).running() as server:
        assert run_agent(make_context, agents, server.url, config=config).output == "The [hidden] it is."
    body = server.requests[0].body
    for name in ("temperature", "max_tokens", "seed", "top_p", "tool_choice"):
        assert body[name] == model[name]
    assert body["model"] == "big"
    assert body["chat_template_kwargs"] == {"thinking": False}
    assert server.requests[0].headers["x-team"] == "blue-team"
    assert "Speak like a pirate." in body["messages"][0]["content"]


def test_keys_reach_the_endpoint_and_nothing_else(agents, make_context, monkeypatch, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEST_MODEL_KEY", KEY)
    steps = [
        call("shell", command="env; cat /proc/*/environ; echo done"),
        call("write_file", path="k", content=f"the key is {KEY}"),
        call("read_file", path="k"),
        answer(f"Here it is: {KEY}"),
    ]
    config = {"tools": {"shell": True, "files": True}, "model": {"api_key_env": "TEST_MODEL_KEY"}}
    with Server(*steps, key=KEY).running() as server:
        ran = run_agent(make_context, agents, server.url, config=config)
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
        told = [result for request in server.requests for result in request.results]
    assert any("done" in result for result in told)
    assert KEY not in "".join(told)
    assert ran.output == "Here it is: [hidden]"
    assert KEY not in json.dumps(ran.result)
    for path in ran.ctx.out_dir.rglob("*"):
        if path.is_file() and path.name != "k":  # which the model itself wrote
            assert KEY not in path.read_text(errors="replace"), path
    assert KEY not in caplog.text


def test_a_refused_key_is_not_in_the_error(agents, make_context, monkeypatch, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEST_MODEL_KEY", KEY)
    with Server(key="another").running() as server:
        ctx = agent_context(make_context, agents, server.url, config={"model": {"api_key_env": "TEST_MODEL_KEY"}})
        with pytest.raises(RunnerError, match="answered 401 Unauthorized: Incorrect API key") as caught:
            AgentRunner().run(ctx)
    import traceback

    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert KEY not in caplog.text
    assert KEY not in (ctx.out_dir / "execution_log.jsonl").read_text()


def test_a_key_that_is_not_set_is_named(agents, make_context) -> None:
    with pytest.raises(BadRequest, match=r"test.model.api_key_env: the variable NO_SUCH_KEY is not set.*pass_env"):
        run_agent(make_context, agents, "http://127.0.0.1:1/v1", config={"model": {"api_key_env": "NO_SUCH_KEY"}})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"task": None}, "spec.task: missing"),
        ({"task": 3}, "spec.task: expected a text"),
        ({"task": "x", "data": {"type": "static", "task": "y"}}, "spec.task: spec.data is given, too"),
        ({"data": {"type": "statik"}, "task": None}, "spec.data.type: unknown source"),
        ({"data": {"type": "static", "task": " "}}, "spec.data.task: expected a text, found white space"),
        ({"configName": "tets"}, "spec.configName: unknown agent configuration 'tets'; did you mean 'test'"),
        ({"configName": "../x"}, "unknown agent configuration '../x'"),
        ({"configName": "test", "agent": {"configName": "other"}}, "but spec.agent.configName says 'other'"),
        ({"agent": {"timeout": 0}}, "spec.agent.timeout"),
        ({"agent": {"timout": 3}}, "spec.agent.timout: unknown field; did you mean"),
        ({"taks": "x"}, "spec.taks: unknown field; did you mean"),
        ({"shard": {"index": 0, "total": 2}}, "spec.shard"),
    ],
)
def test_bad_documents_are_named(spec, said, agents, make_context) -> None:
    with pytest.raises(BadRequest) as caught:
        run_agent(make_context, agents, "http://127.0.0.1:1/v1", spec=spec)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"tools": {"pythn": True}}, "test.tools.pythn: unknown field; did you mean 'python'"),
        ({"type": "choir"}, "test.type"),
        ({"type": "orchestra"}, "test.workers: missing"),
        ({"workers": {"a": {"description": "x"}}}, "only orchestra and workforce have workers"),
        ({"model": {"serve": {"command": ["x"]}}}, "test.model.base_url: give either"),
        ({"model": {"type": "local", "base_url": None}}, "test.model.identifier: missing"),
        ({"mcp_servers": {"a": {"transport": "stdio"}}}, "test.mcp_servers.a.command: missing"),
        ({"mcp_servers": {"a b": {"transport": "sse", "url": "x"}}}, "test.mcp_servers"),
        ({"tools": {"web_search": {"provider": "x"}}}, "no search provider 'x'"),
        ({"tools": {"python": True}, "sandbox": {"network": True}}, "this node allows no network"),
        ({"instructions": "${NOT_SET_HERE}"}, "the variable NOT_SET_HERE is not set"),
        ({"extends": "nobody"}, "test.extends: unknown agent configuration 'nobody'"),
        ({"extends": "test"}, "test.extends: extends itself: test → test"),
    ],
)
def test_bad_configurations_are_named(config, said, agents, make_context) -> None:
    with pytest.raises(BadRequest) as caught:
        run_agent(make_context, agents, "http://127.0.0.1:1/v1", config=config)
    assert said in str(caught.value)


def test_configurations_extend_and_take_from_the_environment(agents, make_context, monkeypatch) -> None:
    monkeypatch.setenv("MY_MODEL", "mine")
    with Server(answer("x")).running() as server:
        agents.mkdir()
        ground = {"model": {"base_url": server.url, "name": "${MY_MODEL}", "temperature": 1.5, "retries": 0},
                  "instructions": "${ABSENT:-be kind}", "tools": {"files": True, "documents": True}}  # fmt: skip
        (agents / "ground.yaml").write_text(yaml.safe_dump(ground))
        top = {"extends": "ground", "model": {"temperature": None, "top_p": 0.5}, "tools": {"files": None}}
        (agents / "top.yaml").write_text(yaml.safe_dump(top))
        ctx = make_context(
            {"task": "x", "agent": {"configName": "top"}}, task_type="agent", limits={"agents_dir": str(agents)}
        )
        AgentRunner().run(ctx)
    body = server.requests[0].body
    assert body["model"] == "mine"
    assert body["top_p"] == 0.5
    assert "temperature" not in body
    assert "be kind" in body["messages"][0]["content"]
    assert {tool["function"]["name"] for tool in body["tools"]} == {"read_document", "final_answer"}


def test_merged_agents_are_refused(agents, make_context) -> None:
    with pytest.raises(BadRequest, match="merge_children: agent tasks cannot be merged"):
        run_agent(make_context, agents, "http://127.0.0.1:1/v1", children=[{"task_id": "c", "spec": {}}])


def test_the_built_in_names_are_there_and_sound(make_context, monkeypatch) -> None:
    from runners.agent.config_files import known_names, load_config

    monkeypatch.setenv("FLOWMESH_SEARCH_URL", "http://127.0.0.1:1/search")
    names = known_names(ROOT / "conf" / "agents")
    assert {"default", "base", "simple_search"} <= set(names)
    ctx = make_context({}, task_type="agent", limits={"agents_dir": str(ROOT / "conf" / "agents")})
    for name in names:
        config = load_config(ctx, name, "spec.configName")
        assert config.description
        assert config.model.serve is not None or config.model.base_url == "http://127.0.0.1:8000/v1"
        assert not config.sandbox.network


@pytest.mark.parametrize(
    ("name", "said"), [("agent-simple", "There are 168 primes below 1000"), ("agent-team", "338350")]
)
def test_the_examples_run_as_they_are(name, said, make_context, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    document = yaml.safe_load((ROOT / "conf" / "tasks" / f"{name}.yaml").read_text())
    ctx = make_context(document["spec"], task_type="agent")
    result = AgentRunner().run(ctx)
    assert said in result["items"][0]["output"]
    for artifact in document["spec"]["output"].get("artifacts", ()):
        assert (ctx.out_dir / artifact).is_file()


def test_a_local_endpoint_that_does_not_start_is_said(agents, make_context, monkeypatch) -> None:
    serve = {"command": ["{python}", "-c", "import sys; sys.exit('no such model here')"]}
    config = {"model": {"base_url": None, "serve": serve}}
    with pytest.raises(RunnerError, match=r"test.model.serve.command: .* exited with status 1 .*: no such model here"):
        run_agent(make_context, agents, "", config=config)
    monkeypatch.setenv("HUB_ENTRY", "hub-entry-0815")
    shown = "import os, sys; sys.exit('refused: ' + os.environ['HUB_ENTRY'])"
    serve = {"command": ["{python}", "-c", shown], "env_from": ["HUB_ENTRY"]}
    with pytest.raises(RunnerError, match=r"refused: \[hidden\]"):
        run_agent(make_context, agents, "", config={"model": {"base_url": None, "serve": serve}})
    serve = {"command": ["{python}", "-c", "import time; time.sleep(60)"], "ready_timeout_s": 0.5}
    with pytest.raises(RunnerError, match=r"did not answer within 0.5 s"):
        run_agent(make_context, agents, "", config={"model": {"base_url": None, "serve": serve}})


def test_a_local_model_thinks_in_this_process(agents, make_context) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'inference'")
    model = {"type": "local", "base_url": None, "identifier": "builtin:tiny-llama", "max_tokens": 8, "temperature": 0,
             "enforce_cpu": True}  # fmt: skip
    ctx = agent_context(make_context, agents, "", config={"model": model})
    with pytest.raises(RunnerError, match=r"length: .* raise model.max_tokens"):  # as random weights never end
        AgentRunner().run(ctx)
    answers = [entry for entry in log_of(ctx) if entry["event"] == "model"]
    assert [entry["completion_tokens"] for entry in answers] == [8]
    assert answers[0]["text"].strip() == (ctx.out_dir / "agent_output.txt").read_text().strip() != ""


def test_a_local_model_names_a_token_that_it_has_no_embedding_for(agents, make_context, tiny_llama, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'inference'")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    shutil.copytree(tiny_llama, tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    model = {"type": "local", "base_url": None, "identifier": str(tmp_path / "more"), "max_tokens": 4,
             "enforce_cpu": True}  # fmt: skip
    with pytest.raises(RunnerError, match=r"^model.identifier: the agent's messages: token '<\|new\|>' has id \d+"):
        run_agent(make_context, agents, "", config={"model": model}, spec={"task": "say <|new|>"})
