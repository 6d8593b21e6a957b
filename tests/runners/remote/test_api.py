"""The task type `api` over the real `openai` client and a real HTTP server on loopback that fails as servers do."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="needs the extra 'api'")
import msgspec
import yaml

from flowmesh.messages.job import Fault
from flowmesh.messages.rows import read
from flowmesh.processes.pipe import Cancel, Pipe
from runners.api import BadRequest, Cancelled, RunnerError
from runners.remote.pace import Pace
from runners.remote.runner import ApiRunner
from tests.kit.openai_server import Break, Fail, Hang, Raw, Say, Server
from tests.kit.paths import PERMITS, ROOT

PRICES = {"input": 1.0, "output": 2.0, "cached_input": 0.5}


def listed(*texts: str) -> dict[str, Any]:
    return {"type": "list", "items": list(texts)}


def asked(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


@pytest.fixture
def ask(make_context):
    def run(server: Server, *texts: str, data: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        fields = {name: options.pop(name) for name in ("anew", "task_id", "pipe", "permits") if name in options}
        spec = {"data": data or listed(*texts), "api": {"base_url": server.url, "model": "m", **options}}
        ctx = make_context(spec, task_type="api", **fields)
        try:
            result = ApiRunner().run(ctx)
        finally:
            run.ctx = ctx
        json.dumps(result, allow_nan=False)
        return result

    return run


def kept(ctx: Any) -> dict[int, Any]:
    with (ctx.out_dir / "rows.jsonl").open("rb") as file:
        return read(file).current


def test_answers_stand_in_the_order_of_the_items_with_tokens_and_cost(ask) -> None:
    with Server(decide=lambda body: Say(f"re: {asked(body)}", usage=(100, 10))) as server:
        body = {"temperature": 0, "response_format": {"type": "json_object"}}
        result = ask(server, *map(str, range(12)), concurrency=4, prices=PRICES, system_prompt="Be brief.", body=body)
    assert [item["output"] for item in result["items"]] == [f"re: {n}" for n in range(12)]
    assert result["request_counts"] == {"total": 12, "completed": 12, "incomplete": 0, "failed": 0}
    assert result["usage"]["prompt_tokens"] == 1200
    assert result["usage"]["num_requests"] == len(server.requests) == 12
    assert result["api_cost"] == {"usd": pytest.approx(12 * 120e-6), "spent_usd": pytest.approx(12 * 120e-6)}
    assert ask.ctx.spent_usd == pytest.approx(12 * 120e-6)
    sent = server.requests[0].body
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["model"], sent["temperature"], sent["response_format"]) == ("m", 0, {"type": "json_object"})
    assert "authorization" not in server.requests[0].headers


def test_what_may_pass_is_tried_again_and_what_may_not_is_not(ask) -> None:
    tries: dict[str, int] = {}
    passing = {
        "429": Fail(429, '{"error": {"message": "slow down"}}', {"Retry-After": "0.05"}),
        "500": Fail(500, "oops"),
        "cut": Break(),
        "html": Raw(b"<html>proxy</html>", "text/html"),
        "json": Raw(b'{"choices": "none"}'),
        "error": Raw(b'{"error": {"message": "overloaded"}}'),
    }

    def decide(body: dict[str, Any]) -> Any:
        text = asked(body)
        tries[text] = tries.get(text, 0) + 1
        if text == "wrong":
            return Fail(400, '{"error": {"message": "too long"}}')
        return passing[text] if text in passing and tries[text] == 1 else Say("good")

    with Server(decide=decide) as server:
        result = ask(server, *passing, "wrong", "plain")
    assert tries == {**dict.fromkeys(passing, 2), "wrong": 1, "plain": 1}
    assert result["request_counts"] == {"total": 8, "completed": 7, "incomplete": 0, "failed": 1}
    assert result["items"][6]["error"]["status"] == 400
    assert "too long" in result["first_errors"][0]
    lines = Path(result["error_file"]["path"]).read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [6]


@pytest.mark.parametrize(
    ("say", "why"),
    [
        (Say("half a", finish="length"), "length"),
        (Say("", finish="content_filter"), "content_filter"),
        (Say(refusal="I will not."), "refusal"),
        (Say(""), "empty"),
        (Say(" \n"), "empty"),
        (Say("x", finish="weird"), "weird"),
        (Say("I call it.", finish="tool_calls"), "tool_calls"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_answer_that_is_not_whole_is_not_a_success(say, why, ask) -> None:
    with Server(decide=lambda body: say if asked(body) == "bad" else Say("good")) as server:
        result = ask(server, "fine", "bad")
        assert result["request_counts"] == {"total": 2, "completed": 1, "incomplete": 1, "failed": 0}
        assert result["items"][1]["incomplete"] == why
        with pytest.raises(RunnerError, match=f"no item has a whole answer; the first: item 0: {why}"):
            ask(server, "bad", task_id="only")


def completion(content: str, **more: Any) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}, **more}


def test_bodies_are_read_as_servers_send_them(ask) -> None:
    second = {"index": 1, "message": {"content": "second"}, "finish_reason": "stop"}
    bodies = {
        "text": Raw(json.dumps(completion("plain")).encode(), "text/plain"),
        "half a character": Raw(rb'{"choices": [{"message": {"content": "hi \ud83d"}, "finish_reason": "stop"}]}'),
        "floats": Raw(json.dumps(completion("x", usage={"prompt_tokens": 3.0, "completion_tokens": 2.0})).encode()),
        "two": Raw(json.dumps({"choices": [second, {**second, "index": 0, "message": {"content": "1st"}}]}).encode()),
        "negative": Raw(json.dumps(completion("x", usage={"prompt_tokens": -3})).encode()),
    }
    with Server(decide=lambda body: bodies[asked(body)]) as server:
        result = ask(server, *bodies, prices=PRICES, retries=0)
    assert [item["output"] for item in result["items"]] == ["plain", "hi \ufffd", "x", "1st", "x"]
    assert [item.get("cost_usd") for item in result["items"]] == [7e-6, None, 7e-6, None, None]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (completion("a part", error={"message": "upstream died"}), "reported an error: upstream died"),
        ({"choices": [{"error": {"message": "upstream died"}, "message": {"content": "a part"}}]}, "upstream died"),
        ({"message": "quota exceeded"}, "reported an error: quota exceeded"),
        ("<html>Please log in</html>", "no JSON: '<html>Please log in</html>'"),
    ],
)
def test_an_error_with_status_200_is_no_answer(body, said, ask) -> None:
    raw = Raw(body.encode(), "text/html") if isinstance(body, str) else Raw(json.dumps(body).encode())
    with Server(decide=lambda _: raw) as server, pytest.raises(RunnerError, match=said):
        ask(server, "a", retries=0)


def test_another_model_and_vectors_of_several_lengths_are_named(ask, caplog) -> None:
    def decide(body: dict[str, Any]) -> Raw:
        if "input" in body:
            return Raw(json.dumps({"data": [{"embedding": [0.5] * len(body["input"])}]}).encode())
        return Raw(json.dumps(completion("x", model=asked(body))).encode())

    with Server(decide=decide) as server:
        result = ask(server, "gpt-4o", "gpt-4o-2024-08-06", "llama-7b", model="gpt-4o")
        assert [item.get("model") for item in result["items"]] == [None, "gpt-4o-2024-08-06", "llama-7b"]
        assert "answered with another model than 'gpt-4o': 'llama-7b' (1 of 3 items)" in caplog.text
        ask(server, "a", "bb", "cc", endpoint="embeddings", task_id="vectors")
        assert (
            "the vectors differ in length, so they are not of one model: 2 (2 of 3 items), 1 (1 of 3 items)"
            in caplog.text
        )


def test_what_an_earlier_turn_thought_is_sent_as_it_stands(ask) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "hm"}]
    with Server(Say("c")) as server:
        ask(server, data={"type": "list", "items": [[*turns, {"role": "user", "content": "d"}]]})
    assert server.requests[0].body["messages"][:2] == turns


def test_a_retry_pays_only_for_what_is_missing(ask) -> None:
    broken = True

    def decide(body: dict[str, Any]) -> Any:
        return Fail(400, "no") if broken and asked(body) == "b" else Say("ok", usage=(1000, 0))

    with Server(decide=decide) as server:
        first = ask(server, "a", "b", "c", "c", prices=PRICES)
        assert first["request_counts"]["failed"] == 1
        broken = False
        sent = len(server.requests)
        second = ask(server, "a", "b", "c", "c", prices=PRICES, anew=False)
        assert [asked(each.body) for each in server.requests[sent:]] == ["b"]
    assert second["rows"]["reused"] == 3
    assert second["api_cost"] == {"usd": pytest.approx(4e-3), "spent_usd": pytest.approx(1e-3)}


@pytest.mark.parametrize(
    "fail",
    [Fail(401), Fail(404), Fail(402), Fail(429, '{"error": {"code": "insufficient_quota", "message": "paid up"}}')],
)
def test_what_every_request_would_get_ends_the_task_at_once(fail, ask) -> None:
    with Server(decide=lambda body: fail if asked(body) == "3" else Say("ok")) as server:
        with pytest.raises(RunnerError, match=f"answered {fail.status}") as caught:
            ask(server, *map(str, range(50)), concurrency=1)
        assert len(server.requests) == 4
    assert not isinstance(caught.value, BadRequest)
    assert len(kept(ask.ctx)) == 3


def test_an_endpoint_that_is_gone_is_not_asked_for_every_item(ask) -> None:
    with Server(decide=lambda _: Fail(503)) as server:
        with pytest.raises(RunnerError, match=r"answered 503 .*so did the last [56] items") as caught:
            ask(server, *map(str, range(50)), concurrency=2, retries=0)
        assert len(server.requests) <= 7
    assert caught.value.fault is Fault.ERROR


def test_a_budget_stops_with_what_there_is(ask) -> None:
    with Server(decide=lambda _: Say("ok", usage=(1000, 0))) as server:
        with pytest.raises(BadRequest, match=r"spec\.api\.max_cost_usd: 0\.0045; 0\.004 is spent, after 4 of 20 items"):
            ask(server, *map(str, range(20)), prices=PRICES, max_cost_usd=0.0045, concurrency=1)
        assert len(kept(ask.ctx)) == 4
        assert ask.ctx.spent_usd == pytest.approx(0.004)
        assert ask.ctx.rows.done == 4
        more = ask(server, *map(str, range(20)), prices=PRICES, max_cost_usd=1, anew=False)
    assert more["rows"]["reused"] == 4
    assert len(server.requests) == 20


def test_retry_after_holds_for_all_requests(ask) -> None:
    at: list[float] = []

    def decide(body: dict[str, Any]) -> Any:
        at.append(time.monotonic())
        return Fail(429, "", {"Retry-After": "1"}) if len(at) == 1 else Say("ok")

    with Server(decide=decide) as server:
        ask(server, "a", "b", "c", concurrency=1)
    assert at[1] - at[0] >= 1
    with (
        Server(decide=lambda _: Fail(429, "", {"Retry-After": "4000"})) as server,
        pytest.raises(RunnerError, match="it asks to wait for 4000 s"),
    ):
        ask(server, "a", task_id="long")


def test_pace_has_no_more_than_was_asked_for_in_any_minute() -> None:
    now = 0.0
    pace, starts = Pace(60, 600, clock=lambda: now), []
    for number in range(40):
        now += pace.take(20)
        starts.append(now)
        pace.correct(20, 40 if number < 5 else 20)
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert gaps[:4] == pytest.approx([4] * 4)  # 40 tokens of 600 a minute
    assert gaps[6:] == pytest.approx([2] * 33)
    pace.pause(30)
    assert pace.take(1) == pytest.approx(30)


@pytest.mark.parametrize("step", [Hang(), Fail(429, "", {"Retry-After": "500"})], ids=["silent", "waiting"])
def test_a_cancel_ends_it_at_once_and_keeps_the_rows(step, ask) -> None:
    mine, near = Pipe.pair()
    with contextlib.closing(mine), contextlib.closing(near):
        _check_cancel(step, ask, mine, near)


def _check_cancel(step, ask, mine: Pipe, near: Pipe) -> None:
    with Server(decide=lambda body: Say("ok") if asked(body) == "first" else step) as server:

        def cancel() -> None:
            while len(server.requests) < 2:
                time.sleep(0.01)
            near.send(Cancel("enough"))

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(Cancelled, match="enough"):
            ask(server, "first", "second", concurrency=1, pipe=mine, timeoutSec=600)
        thread.join()
    assert {index: row.item["output"] for index, row in kept(ask.ctx).items()} == {0: "ok"}
    assert ask.ctx.rows.done == 1


def test_a_key_goes_only_where_the_operator_lets_it(ask, monkeypatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    allowed = msgspec.structs.replace(PERMITS, api_keys=("SOME_*@127.0.0.1",))
    elsewhere = msgspec.structs.replace(PERMITS, api_keys=("SOME_KEY@api.openai.com", "OTHER@127.0.0.1"))
    with Server(decide=lambda _: Say("ok"), key="sk-very-secret") as server:
        assert ask(server, "a", api_key_env="SOME_KEY", permits=allowed)["items"][0]["output"] == "ok"
        with pytest.raises(BadRequest, match=r"spec\.api\.api_key_env: .*tasks\.api_keys does not let SOME_KEY"):
            ask(server, "a", api_key_env="SOME_KEY", permits=elsewhere, task_id="two")
        monkeypatch.setenv("SOME_KEY", "sk-another-one")
        with pytest.raises(RunnerError, match="answered 401") as caught:
            ask(server, "a", api_key_env="SOME_KEY", permits=allowed, task_id="three")
        assert "sk-another-one" not in str(caught.value)  # the server repeats it
        local = msgspec.structs.replace(PERMITS, local_hosts=())
        with pytest.raises(BadRequest, match=r"spec\.api\.base_url"):
            ask(server, "a", permits=local, task_id="four")


def test_completions_and_embeddings_are_read_as_what_they_are(ask) -> None:
    def decide(body: dict[str, Any]) -> Any:
        usage = {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}}
        if "input" in body:
            return Raw(json.dumps({"data": [{"embedding": [0.5, len(body["input"])]}], "usage": usage}).encode())
        return Raw(json.dumps({"choices": [{"text": f"{body['prompt']}!", "finish_reason": "stop"}]}).encode())

    with Server(decide=decide) as server:
        vectors = ask(server, "a", "bb", endpoint="embeddings", prices=PRICES)
        assert [item["embedding"] for item in vectors["items"]] == [[0.5, 1], [0.5, 2]]
        assert vectors["usage"]["cached_tokens"] == 4
        assert vectors["api_cost"]["usd"] == pytest.approx(2 * (1 + 2 * 0.5 + 2) / 1e6)
        texts = ask(server, "a", endpoint="completions", prices=PRICES, model=None, task_id="text")
        assert texts["items"][0]["output"] == "a!"
        assert texts["model"] == "test-model"
        assert texts["api_cost"]["items_without_usage"] == 1
        with pytest.raises(RunnerError, match=r"reports no usage, so spec\.api\.max_cost_usd"):
            ask(server, "a", endpoint="completions", prices=PRICES, max_cost_usd=1, task_id="budget")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base_url": "ftp://x"}, "spec.api.base_url"),
        ({"base_url": "http://u:p@x/v1"}, "no user, password or query"),
        ({"body": {"stream": True}}, "spec.api.body.stream"),
        ({"headers": {"X-Name": "Zoë"}}, "spec.api.headers.X-Name: the value must be printable ASCII"),
        ({"headers": {"X-Two": "a\nb"}}, "spec.api.headers.X-Two: the value contains a line break"),
        ({"headers": {"X A": "b"}}, "spec.api.headers: 'X A' is not a valid header name"),
        (
            {"headers": {"content-length": "5"}},
            "spec.api.headers.content-length: this header belongs to the connection",
        ),
        ({"body": {"messages": []}}, "spec.api.body.messages: comes from spec.data"),
        ({"max_cost_usd": 1}, "spec.api.max_cost_usd: needs spec.api.prices"),
        ({"endpoint": "completions", "system_prompt": "x"}, "spec.api.system_prompt"),
        ({"concurency": 2}, "did you mean 'concurrency'"),
        ({"concurrency": 1000}, "spec.api.concurrency"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_is_refused_by_name(options, said, make_context) -> None:
    spec = {"data": listed("a"), "api": {"base_url": "http://127.0.0.1:9/v1", **options}}
    with pytest.raises(BadRequest) as caught:
        ApiRunner().run(make_context(spec, task_type="api"))
    assert said in str(caught.value)


def test_the_example_runs_as_it_is(make_context, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    spec = yaml.safe_load((ROOT / "conf/tasks/api.yaml").read_text())["spec"]
    result = ApiRunner().run(make_context(spec, task_type="api"))
    assert result["request_counts"]["completed"] == len(result["items"]) > 1
    assert result["api_cost"]["usd"] > 0


def test_it_imports_nothing_heavy() -> None:
    program = "import sys; import runners.remote.runner, runners.remote.batch; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=ROOT)
