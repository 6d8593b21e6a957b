"""What endpoints answer besides whole and regular answers, over real HTTP: streams, errors, retries, cancels."""

from __future__ import annotations

import email.utils
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("smolagents", reason="needs the extra 'agent'")
pytest.importorskip("openai", reason="needs the extra 'agent'")

from flowmesh.processes.pipe import Cancel, Pipe
from runners.agent.runner import AgentRunner
from runners.api import Cancelled, RunnerError
from tests.kit.agent_support import agent_context, log_of, run_agent
from tests.kit.openai_server import (
    Events,
    Fail,
    Hang,
    Raw,
    Say,
    Server,
    Step,
    answer,
    call,
    delta,
)

TOOLS = {"tools": {"files": True}}
STREAM = {**TOOLS, "model": {"stream": True}}


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


def whole(message: Any = None, finish: str | None = "stop", **more: Any) -> Raw:
    """A completion that is not streamed, whatever was asked for."""
    return Raw(json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish}], **more}).encode())


def piece(index: Any = None, id: Any = None, name: str | None = None, arguments: Any = None) -> dict[str, Any]:
    """A part of a streamed call, with no more than what is given."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    head = {key: value for key, value in (("index", index), ("id", id)) if value is not None}
    return {**head, **({"function": function} if function else {})}


def stream(*events: list[dict[str, Any]]) -> Events:
    return Events((*(delta(tool_calls=pieces) for pieces in events), delta("tool_calls")))


A, B = '{"path": "a", "content": "1"}', '{"path": "b", "content": "2"}'


@pytest.mark.parametrize(
    "both",
    [
        pytest.param([[piece(0, "x", "write_file", A)], [piece(0, "y", "write_file", B)]], id="equal indices"),
        pytest.param([[piece(0, None, "write_file", A)], [piece(0, None, "write_file", B)]], id="no ids"),
        pytest.param([[piece(None, "x", "write_file", A)], [piece(None, "y", "write_file", B)]], id="no indices"),
        pytest.param([[piece(None, None, "write_file", A)], [piece(None, None, "write_file", B)]], id="neither"),
        pytest.param([[piece(0, "x", "write_file", A), piece(0, "x", "write_file", B)]], id="one event, all the same"),
        pytest.param([[piece(0, "x", "write_file", A)], [piece(1, "x", "write_file", B)]], id="equal ids"),
        pytest.param([[piece("0", "x", "write_file", A)], [piece("1", "y", "write_file", B)]], id="indices are texts"),
        pytest.param(
            [
                [piece(0, "x", "write_file", ""), piece(0, "y", "write_file", "")],
                [piece(0, "x", None, A[:9])],
                [piece(0, "y", None, B[:12])],
                [piece(0, "x", None, A[9:])],
                [piece(0, "y", None, B[12:])],
            ],
            id="interleaved",
        ),
        pytest.param(
            [
                [piece(0, "x")], [piece(0, None, "wri")], [piece(0, None, "te_file")],
                *([piece(0, None, None, part)] for part in (A[:5], A[5:])),
                [piece(1, "y", "write")], [piece(1, None, "_file")], [piece(1, None, None, B)],
            ],
            id="names in pieces",
        ),
        pytest.param(
            [
                [piece(0, "x", "write_file", A[:9])], [piece(0, "x", "write_file", A[9:])],
                [piece(1, "y", "write_file", B[:9])], [piece(1, "y", "write_file", B[9:])],
            ],
            id="each piece has all",
        ),
        pytest.param(
            [
                [piece(0, "x", "write_file")], [piece(0, "x2", None, A[:9])], [piece(0, "x3", None, A[9:])],
                [piece(1, "y", "write_file")], [piece(1, "y2", None, B)],
            ],
            id="another id with each piece",
        ),
        pytest.param(
            [[piece(0, "x", "write_file", json.loads(A))], [piece(1, "y", "write_file", json.loads(B))]], id="objects"
        ),
    ],
)  # fmt: skip
def test_streamed_calls_stay_apart(both, agents, make_context) -> None:
    with Server(stream(*both), answer("done")).running() as server:
        ran = run_agent(make_context, agents, server.url, config=STREAM)
        said = server.requests[1].body["messages"][-3]["tool_calls"]
        results = [message for message in server.requests[1].body["messages"] if message["role"] == "tool"]
    assert ran.output == "done"
    assert [each["function"]["name"] for each in said] == ["write_file", "write_file"]
    assert [result["content"] for result in results] == ["a written", "b written"]
    ids = [each["id"] for each in said]
    assert len(set(ids)) == 2
    assert [result["tool_call_id"] for result in results] == ids
    assert (ran.ctx.out_dir / "workspace" / "a").read_text() == "1"
    assert (ran.ctx.out_dir / "workspace" / "b").read_text() == "2"


def test_different_calls_without_arguments_stay_apart(agents, make_context) -> None:
    calls = stream(
        [piece(0, None, "list_files", "")], [piece(0, None, "read_file", "")], [piece(0, None, None, '{"path": "x"}')]
    )
    with Server(calls, answer("done")).running() as server:
        run_agent(make_context, agents, server.url, config=STREAM)
        assert server.requests[1].results[0] == "the folder is empty"
        assert "no such file" in server.requests[1].results[1]


@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream", "text/plain"])
def test_a_server_that_ignores_stream_works(content_type, agents, make_context) -> None:
    calls = [{"id": "x", "type": "function", "function": {"name": "write_file", "arguments": A}}]
    first, last = whole({"content": None, "tool_calls": calls}, "tool_calls"), whole({"content": "Zeile\u2028zwei"})
    for step in (first, last):
        step.content_type = content_type
    with Server(first, last).running() as server:
        ran = run_agent(make_context, agents, server.url, config=STREAM)
        assert server.requests[1].results == ["a written"]
    assert ran.output == "Zeile\u2028zwei"


def test_a_server_that_streams_unasked_works(agents, make_context) -> None:
    body = "".join(
        f"data: {json.dumps(event)}\n\n"
        for event in (delta(content="Pa"), delta(content="ris \ud83d"), delta(content="\ude00"), delta("stop"))
    )
    odd = Raw(f": hello\r\n\r\nid: 3\n{body}".encode())
    with Server(odd).running() as server:
        assert run_agent(make_context, agents, server.url).output == "Paris \U0001f600"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("step", "said", "output"),
    [
        (Say("The answer is fo", finish="length"), "length: the answer was cut off", "The answer is fo"),
        (Say("<think>It is", finish="length"), "length: the answer was cut off", "<think>It is"),
        (Say("Here is how to", finish="content_filter"), "content_filter: ", "Here is how to"),
        (Say("Half an", finish="error"), "error: the endpoint ended the answer", "Half an"),
        (Say("Half an", finish="insufficient_system_resource"), "insufficient_system_resource: ", "Half an"),
        (Say(refusal="I will not do that."), "refusal: the model refused: I will not do that.", ""),
        (Say("Well.", refusal="No."), "refusal: the model refused: No.", "Well."),
        (Say(""), "empty: the answer has neither text nor a call", ""),
        (Say("<think>It is 4.</think>"), "empty: the answer has nothing but thinking", "<think>It is 4.</think>"),
        (Say("I call.", finish="tool_calls"), "tool_calls: the endpoint announced calls", "I call."),
        (Say(calls=(("write_file", {"path": "a", "content": "b"}),), finish="content_filter"), "content_filter: ", ""),
    ],
)
def test_what_is_no_answer_is_never_completed(  # noqa: PLR0917
    step, said, output, stream, agents, make_context
) -> None:
    config = {**TOOLS, "model": {"stream": stream}}
    with Server(decide=lambda _: step).running() as server:
        ctx = agent_context(make_context, agents, server.url, config=config)
        with pytest.raises(RunnerError) as caught:
            AgentRunner().run(ctx)
        assert len(server.requests) == 1
    assert str(caught.value).startswith(said)
    assert (ctx.out_dir / "agent_output.txt").read_text().strip() == output
    assert not (ctx.out_dir / "workspace" / "a").exists()
    assert [entry["error"] for entry in log_of(ctx) if entry["event"] == "failed"] == [str(caught.value)]


def test_an_item_without_an_answer_is_failed_among_others(agents, make_context) -> None:
    def decide(body: dict[str, Any]) -> Step:
        return Say("Cut of", finish="length") if "long" in body["messages"][1]["content"] else Say("Short.")

    with Server(decide=decide).running() as server:
        spec = {"data": {"type": "list", "items": ["a long one", "a short one"]}}
        ran = run_agent(make_context, agents, server.url, spec=spec)
    assert [item["finish_reason"] for item in ran.items] == ["failed", "completed"]
    assert [item["output"] for item in ran.items] == ["Cut of", "Short."]
    assert ran.items[0]["error"].startswith("length: ")


def test_an_error_is_not_the_answer_of_a_run_out_of_turns(agents, make_context) -> None:
    def decide(body: dict[str, Any]) -> Step:
        return call("list_files") if "tools" in body else Say("Half of", finish="length")

    with Server(decide=decide).running() as server:
        ctx = agent_context(make_context, agents, server.url, config={**TOOLS, "max_turns": 1})
        with pytest.raises(RunnerError, match="max_turns: no answer after 1 turns"):
            AgentRunner().run(ctx)
    assert (ctx.out_dir / "agent_output.txt").read_text() == "\n"
    assert (
        "length: the answer was cut off" in [entry for entry in log_of(ctx) if entry["event"] == "error"][-1]["error"]
    )


QUOTA = {"error": {"message": "quota exceeded", "type": "insufficient_quota", "code": None}}


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Raw(json.dumps(QUOTA).encode()), "reported an error: quota exceeded"),
        (Raw(b'{"error": "quota exceeded"}'), "reported an error: quota exceeded"),
        (Raw(b'{"object": "error", "message": "too many tokens", "code": 400}'), "reported an error: too many tokens"),
        (Raw(b'{"detail": "no such deployment"}'), "reported an error: no such deployment"),
        (Raw(json.dumps({**QUOTA, "choices": []}).encode()), "reported an error: quota exceeded"),
        (Raw(b'{"choices": [{"error": {"message": "upstream died"}}]}'), "reported an error: upstream died"),
        (Raw(b'{"choices": []}'), "gave an answer without choices"),
        (Raw(b'{"choices": null}'), "gave an answer without choices"),
        (Raw(b'{"id": "x"}'), "gave an answer without choices"),
        (Raw(b'{"choices": [{"message": "text"}]}'), "not a chat completion"),
        (Raw(b'{"choices": [{"message": {"content": 4}}]}'), "not a chat completion"),
        (Raw(b'["quota exceeded"]'), "not a chat completion"),
        (Raw(b"<html>Log in first</html>", "text/html"), "it begins with '<html>Log in"),
        (Raw(b""), "broke off"),
        (Events((QUOTA,), done=False), "reported an error: quota exceeded"),
        (Events((delta(content="Half an"), QUOTA)), "reported an error: quota exceeded"),
        (Events((delta(content="Half an"), QUOTA), done=False, hang=True), "reported an error: quota exceeded"),
        (
            Events((delta(content="Half"), 'event: error\ndata: {"message": "too slow"}\n\n')),
            "reported an error: too slow",
        ),
        (Events((delta(content="Half"), "event: error\ndata: overloaded\n\n")), "reported an error: overloaded"),
        (Events((delta(content="Half"), "data: {not json}\n\n")), "not a chat completion"),
        (Events((delta(content="Half"), '{"error": {"message": "the proxy gave up"}}\n')), "error: the proxy gave up"),
        (Events((delta(content="Half"),), done=False), "broke off in the middle of its answer"),
        (Events(({"choices": [], "usage": {"prompt_tokens": 1}},)), "gave an answer without choices"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_with_status_200_are_reported(step, said, stream, agents, make_context) -> None:
    with Server(decide=lambda _: step).running() as server:
        ctx = agent_context(make_context, agents, server.url, config={"model": {"stream": stream}})
        with pytest.raises(RunnerError) as caught:
            AgentRunner().run(ctx)
    assert said in str(caught.value)
    assert f"the model endpoint {server.url}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_that_may_pass_is_repeated_and_another_is_not(agents, make_context) -> None:
    busy = Raw(b'{"error": {"message": "overloaded", "code": 503}}')
    config = {"model": {"retries": 3, "stream": True}}
    with Server(busy, Say("There.")).running() as server:
        assert run_agent(make_context, agents, server.url, config=config).output == "There."
    with Server(decide=lambda _: Raw(json.dumps(QUOTA).encode())).running() as server:
        with pytest.raises(RunnerError, match="quota exceeded"):
            run_agent(make_context, agents, server.url, config=config)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{not json", "not valid JSON"),
        (f"{A}{A}", "not valid JSON (Extra data"),
        ('{"path": NaN}', "not valid JSON (NaN is not JSON)"),
        ('{"path": "a", "content": "12', "cut off before their end"),
        ('{"path": "a",', "cut off before their end"),
        ("[" * 100_000, "not valid JSON"),
        ('["a"]', "JSON, but not an object: a list"),
        ('"a"', "JSON, but not an object: a string"),
        ("7", "JSON, but not an object: a number"),
        ("[]", "JSON, but not an object: a list"),
        ("null", "JSON, but not an object: null"),
        ("false", "JSON, but not an object: a boolean"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_malformed_arguments_are_reported_to_the_model(arguments, said, several, agents, make_context) -> None:
    """`shell` has one argument, a text: smolagents would run a text that is not JSON as the command."""
    calls = (("shell", arguments), *([("list_files", {})] if several else []))
    ids = ("call_mine", "call_other")[: len(calls)]
    config = {"tools": {"shell": True, "files": True}}
    with Server(Say(calls=calls, ids=ids, finish="length"), answer("I see.")).running() as server:
        ran = run_agent(make_context, agents, server.url, config=config)
        messages = server.requests[1].body["messages"]
    told = [message for message in messages if message["role"] == "tool"]
    assert [message["tool_call_id"] for message in told] == list(ids)
    assert f"the call was not run: its arguments are {said}" in told[0]["content"]
    assert arguments[:100] in told[0]["content"]
    assert "".join(each["content"] for each in told[1:]) == ("the folder is empty" if several else "")
    asked = next(message for message in messages if message.get("tool_calls"))
    assert json.loads(asked["tool_calls"][0]["function"]["arguments"]) == {}
    assert ran.events("tool_call")[0]["arguments"] == {"malformed": arguments} or len(arguments) > 1000


def test_no_arguments_are_an_empty_object(agents, make_context) -> None:
    for arguments in ("", " ", "{}"):
        with Server(Say(calls=(("list_files", arguments),)), answer("x")).running() as server:
            run_agent(make_context, agents, server.url, config=TOOLS)
            assert server.requests[1].results == ["the folder is empty"]


def test_half_a_character_does_not_end_the_run(agents, make_context) -> None:
    calls = [{"id": "x", "function": {"name": "read_file", "arguments": r'{"path": "\ud83d"}'}}]
    with Server(whole({"content": "half \ud83d", "tool_calls": calls}), answer("x")).running() as server:
        assert run_agent(make_context, agents, server.url, config=TOOLS).output == "x"
        assert server.requests[1].body["messages"][-2]["content"] == "half \ufffd"


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_kept_to(date, agents, make_context) -> None:
    asked: list[float] = []

    def decide(_: dict[str, Any]) -> Step:
        asked.append(time.monotonic())
        after = email.utils.formatdate(time.time() + 3, usegmt=True) if date else "2"
        return Fail(429, "", {"Retry-After": after}) if len(asked) == 1 else Say("Now.")

    with Server(decide=decide).running() as server:
        config = {"model": {"retries": 1}}
        assert run_agent(make_context, agents, server.url, config=config).output == "Now."
    assert asked[1] - asked[0] >= 1.5  # a date has whole seconds


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_retries_end(status, agents, make_context) -> None:
    refused = Fail(status, '{"error": {"message": "not now"}}', {"Retry-After": "0.01"})
    with Server(decide=lambda _: refused).running() as server:
        with pytest.raises(RunnerError, match=f"answered {status} .*not now"):
            run_agent(make_context, agents, server.url, config={"model": {"retries": 2}})
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_stays_refused_is_not_repeated(status, agents, make_context) -> None:
    with Server(decide=lambda _: Fail(status, '{"error": {"message": "no"}}')).running() as server:
        with pytest.raises(RunnerError, match=f"answered {status} "):
            run_agent(make_context, agents, server.url, config={"model": {"retries": 3}})
        assert len(server.requests) == 1


def test_a_wait_of_an_hour_is_not_waited_for(agents, make_context) -> None:
    with Server(decide=lambda _: Fail(429, "{}", {"Retry-After": "3600"})).running() as server:
        with pytest.raises(RunnerError, match=r"answered 429 Too Many Requests.*Retry-After: 3600"):
            run_agent(make_context, agents, server.url, config={"model": {"retries": 3}})
        assert len(server.requests) == 1


def test_a_wrong_model_name_is_one_clear_line(agents, make_context) -> None:
    refused = Fail(404, '{"error": {"message": "The model `big` does not exist.", "code": "model_not_found"}}')
    with Server(refused).running() as server, pytest.raises(RunnerError) as caught:
        run_agent(make_context, agents, server.url, config={"model": {"name": "big"}})
    assert str(caught.value) == (
        f"the model endpoint {server.url} answered 404 Not Found: The model `big` does not exist. "
        "(check test.model.name, 'big', and test.model.base_url)"
    )


@pytest.mark.parametrize(
    ("step", "stream"), [(Hang(), False), (Events((delta(content="Half"),), done=False, hang=True), True)]
)
def test_an_endpoint_that_stays_silent_is_named(step, stream, agents, make_context) -> None:
    with Server(decide=lambda _: step).running() as server:
        with pytest.raises(RunnerError, match=r"the model endpoint .* was silent for 0.5 s"):
            run_agent(make_context, agents, server.url, config={"model": {"timeout_s": 0.5, "stream": stream}})
        assert len(server.requests) == 1


def test_events_with_both_delta_and_message_are_read_once(agents, make_context) -> None:
    last = {"choices": [{"index": 0, "delta": {}, "message": {"content": "Paris."}, "finish_reason": "stop"}]}
    with Server(Events((delta(content="Par"), delta(content="is."), last))).running() as server:
        assert run_agent(make_context, agents, server.url, config=STREAM).output == "Paris."


def test_variables_of_other_endpoints_are_not_sent(agents, make_context, monkeypatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, f"value-of-{name}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    with Server(Say("x")).running() as server:
        run_agent(make_context, agents, server.url)
        assert "authorization" not in server.requests[0].headers
        assert "value-of" not in json.dumps(server.requests[0].headers)
    config = {"model": {"headers": {"authorization": "Basic abcdefgh", "openai-project": "ours-and-ours"}}}
    with Server(Say("x")).running() as server:
        run_agent(make_context, agents, server.url, config=config)
        assert server.requests[0].headers["authorization"] == "Basic abcdefgh"
        assert server.requests[0].headers["openai-project"] == "ours-and-ours"


@pytest.mark.parametrize(
    ("step", "stream"),
    [
        (Hang(), False),
        (Hang(), True),
        (Events((delta(content="Half"),), done=False, hang=True), True),
        (Fail(429, "", {"Retry-After": "60"}), False),
    ],
    ids=["no answer", "no stream", "a silent stream", "a pause"],
)
def test_a_cancel_takes_effect_while_the_endpoint_is_silent(step, stream, pipes, agents, make_context) -> None:
    near, far = pipes
    with Server(decide=lambda _: step).running() as server:
        ctx = agent_context(
            make_context, agents, server.url, config={"model": {"stream": stream, "retries": 1}}, pipe=far
        )

        def cancel() -> None:
            server.asked.wait(60)
            time.sleep(0.3)  # so that it waits
            near.send(Cancel("enough"))

        canceller = threading.Thread(target=cancel)
        canceller.start()
        with pytest.raises(Cancelled, match="enough"):
            AgentRunner().run(ctx)
        canceller.join()
        assert len(server.requests) == 1
        assert isinstance(step, Fail) or server.left.wait(30)


def test_a_run_out_of_time_leaves_no_request_behind(agents, make_context) -> None:
    """Else the endpoint would go on to generate for nobody, while the next item waits."""
    with Server(Hang(), Say("x")).running() as server:
        spec = {"data": {"type": "list", "items": ["a", "b"]}, "agent": {"timeout": 2}}
        ran = run_agent(make_context, agents, server.url, spec=spec)
        assert server.left.wait(30)
    assert [item["finish_reason"] for item in ran.items] == ["failed", "completed"]
