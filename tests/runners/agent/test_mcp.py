"""Agents with the tools of a real MCP server, over each transport."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("smolagents", reason="needs the extra 'agent'")
pytest.importorskip("mcp", reason="needs mcp")

from flowmesh.processes.pipe import Cancel, Pipe
from runners.agent.runner import AgentRunner
from runners.api import BadRequest, Cancelled, RunnerError
from tests.kit import mcp_server
from tests.kit.agent_support import agent_context, run_agent
from tests.kit.openai_server import Say, Server, answer, call
from tests.kit.support import until

SCRIPT = Path(mcp_server.__file__)
STDIO = {"transport": "stdio", "command": "{python}", "args": [str(SCRIPT), "stdio"]}


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    return tmp_path / "agents"


@pytest.fixture(scope="module", params=["sse", "streamable-http"])
def remote(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """A server of its own over HTTP, and how a configuration names it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(SCRIPT), request.param, str(port)])
    while True:
        assert process.poll() is None
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    path = "/sse" if request.param == "sse" else "/mcp"
    yield {"transport": request.param.replace("-", "_"), "url": f"http://127.0.0.1:{port}{path}"}
    process.terminate()
    process.wait()


def use(servers: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"mcp_servers": servers, **more}


def check_tools(make_context: Any, agents: Path, servers: dict[str, Any]) -> None:
    steps = [
        Say(calls=(("add", {"a": 2}), ("total", {"numbers": [1.5, 2], "options": {"negate": True}}))),
        call("fail", reason="weather"),
        call("add", a="two"),
        answer("done"),
    ]
    with Server(*steps).running() as server:
        ran = run_agent(make_context, agents, server.url, config=use(servers))
        assert server.requests[1].results == ["3", "-3.5"]
        assert "as you wish: weather" in server.requests[2].results[2]
        tools = {tool["function"]["name"]: tool["function"] for tool in server.requests[0].body["tools"]}
    assert ran.output == "done"
    assert {"add", "total", "fail", "what_env", "final_answer"} <= set(tools)
    assert tools["add"]["parameters"]["required"] == ["a"]
    assert tools["add"]["parameters"]["properties"]["a"]["description"] == "one number"
    assert tools["total"]["parameters"]["properties"]["numbers"]["items"] == {"type": "number"}
    assert tools["add"]["description"] == "Adds two numbers."


def test_tools_over_stdio(agents, make_context) -> None:
    check_tools(make_context, agents, {"math": STDIO})


def test_tools_over_http(remote, agents, make_context) -> None:
    check_tools(make_context, agents, {"math": remote})


def test_a_stdio_server_has_a_small_environment_and_ends_with_the_task(agents, make_context, monkeypatch) -> None:
    monkeypatch.setenv("MCP_TOKEN", "mcp-token-0815")
    monkeypatch.setenv("NODE_SECRET_THING", "not for servers")
    steps = [
        call("what_env", name="MCP_TOKEN"),
        call("what_env", name="NODE_SECRET_THING"),
        call("what_env", name="PLAIN"),
        call("pid"),
        answer("mcp-token-0815"),
    ]
    config = use({"s": {**STDIO, "env_from": ["MCP_TOKEN"], "env": {"PLAIN": "plain-value"}}})
    with Server(*steps).running() as server:
        ran = run_agent(make_context, agents, server.url, config=config)
        told = server.requests[-1].results
    assert told[:2] == ["[hidden]", "(not set)"]
    assert int(told[3]) not in psutil.pids()
    assert ran.output == "[hidden]"
    assert "mcp-token-0815" not in (ran.ctx.out_dir / "execution_log.jsonl").read_text()


def test_only_what_is_secret_among_a_servers_settings_is_hidden(remote, agents, make_context) -> None:
    """The model works with the rest: a folder, a team's name."""
    env = {"DOCS_DIR": "/srv/reports", "API_TOKEN": "tok-4711-abc"}
    headers = {"X-Team": "blue-team", "Authorization": "Basic dXNlcjpwdw==", "X-Api-Key": "key-0815-xyz"}
    servers = {"s": {**STDIO, "env": env, "tools": ["what-env"]}, "r": {**remote, "headers": headers, "tools": ["add"]}}
    steps = [call("what_env", name="DOCS_DIR"), call("what_env", name="API_TOKEN")]
    said = "blue-team: dXNlcjpwdw== or key-0815-xyz, in /srv/reports/a.md"
    with Server(*steps, answer(said)).running() as server:
        ran = run_agent(make_context, agents, server.url, config=use(servers))
        assert server.requests[-1].results == ["/srv/reports", "[hidden]"]
    assert ran.output == "[hidden]: [hidden] or [hidden], in /srv/reports/a.md"


def test_only_some_tools_and_unique_names(agents, make_context) -> None:
    servers = {"one": {**STDIO, "tools": ["add", "pid"]}, "two": {**STDIO, "tools": ["add"]}}
    with Server(answer("x")).running() as server:
        run_agent(make_context, agents, server.url, config=use(servers, tools={"files": True}))
        names = {tool["function"]["name"] for tool in server.requests[0].body["tools"]}
    assert names == {"add", "pid", "two_add", "read_file", "write_file", "list_files", "final_answer"}


def test_a_server_that_dies_is_the_agents_news(agents, make_context) -> None:
    with Server(call("die"), call("add", a=1), answer("it died")).running() as server:
        ran = run_agent(make_context, agents, server.url, config=use({"s": {**STDIO, "timeout_s": 10}}))
        assert "the MCP server s" in server.requests[1].results[0]
        assert "the MCP server s" in server.requests[2].results[1]
    assert ran.output == "it died"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"transport": "stdio", "command": "/no/such/program"}, "'/no/such/program' cannot be started: No such file"),
        (
            {"transport": "stdio", "command": "{python}", "args": ["-c", "pass"], "timeout_s": 20},
            "test.mcp_servers.s: ",
        ),
        ({"transport": "stdio", "command": "sleep", "args": ["600"], "timeout_s": 0.5}, "no answer within 0.5 s"),
        ({"transport": "streamable_http", "url": "http://127.0.0.1:9/mcp", "timeout_s": 20}, "test.mcp_servers.s: "),
        ({**STDIO, "tools": ["divide"]}, "test.mcp_servers.s.tools: it has no divide (it has: add, "),
    ],
)
def test_a_server_that_cannot_be_had_is_named(wanted, said, agents, make_context) -> None:
    with pytest.raises(RunnerError) as caught, Server().running() as server:
        run_agent(make_context, agents, server.url, config=use({"s": wanted}))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_variable_is_named(agents, make_context) -> None:
    said = r"mcp_servers.s.env_from: the variable NO_SUCH is not set"
    with Server().running() as server, pytest.raises(BadRequest, match=said):
        run_agent(make_context, agents, server.url, config=use({"s": {**STDIO, "env_from": ["NO_SUCH"]}}))


def test_a_cancel_does_not_wait_for_a_slow_tool(agents, make_context, tmp_path) -> None:
    near, far = Pipe.pair()
    begun = tmp_path / "begun"
    with Server(call("slow", seconds=600, begun=str(begun))).running() as server:
        ctx = agent_context(make_context, agents, server.url, config=use({"s": {**STDIO, "timeout_s": 600}}), pipe=far)

        def cancel() -> None:
            until(begun.exists, "the tool is at work")
            near.send(Cancel("enough"))

        listener = threading.Thread(target=cancel)
        listener.start()
        with pytest.raises(Cancelled, match="enough"):
            AgentRunner().run(ctx)
        listener.join()
    near.close()
    far.close()
    assert not servers_of_tools()


def servers_of_tools() -> list[psutil.Process]:
    """Those of this process; one that has ended has no command line."""
    found = []
    for each in psutil.Process(os.getpid()).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "mcp_server.py stdio" in " ".join(each.cmdline()):
                found.append(each)
    return found
