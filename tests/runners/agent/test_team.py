"""Teams: orchestra and workforce, with an endpoint that plays every part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("smolagents", reason="needs the extra 'agent'")

from runners.agent.runner import AgentRunner
from runners.api import RunnerError
from tests.kit.agent_support import agent_context, run_agent
from tests.kit.openai_server import (
    Fail,
    Say,
    Server,
    Step,
    answer,
    call,
)

WORKERS = {
    "reader": {"description": "Reads files.", "tools": {"files": True}, "max_turns": 3},
    "writer": {"description": "Writes.", "instructions": "Write in verse.", "tools": {}},
}
Part = Callable[[dict[str, Any], str], Step]


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    return tmp_path / "agents"


def parts(**by_role: Part) -> Callable[[dict[str, Any]], Step]:
    """Answers by who is asked: planner, breakdown, assign, review, report, reader, writer."""
    marks = {
        "planner": "You plan how a team", "breakdown": "You coordinate a team", "assign": "You assign a step",
        "review": "You check whether a step", "report": "You write the final answer",
    }  # fmt: skip

    def decide(body: dict[str, Any]) -> Step:
        system = body["messages"][0]["content"]
        user = body["messages"][1]["content"]
        for role, mark in marks.items():
            if mark in system:
                return by_role[role](body, user)
        return by_role["writer" if "Write in verse." in system else "reader"](body, user)

    return decide


def plan(*steps: tuple[str, str]) -> Part:
    return lambda _body, _user: Say(json.dumps([{"worker": worker, "task": task} for worker, task in steps]))


def test_an_orchestra_plans_works_and_reports(agents, make_context) -> None:
    asked: dict[str, str] = {}

    def remember(role: str, said: str) -> Part:
        def part(_body: dict[str, Any], user: str) -> Step:
            asked[role] = user
            return Say(said) if role == "report" else answer(said)

        return part

    decide = parts(
        planner=plan(("reader", "find the number"), ("writer", "make a verse of it")),
        reader=remember("reader", "the number is 7"),
        writer=remember("writer", "seven in heaven"),
        report=remember("report", "Seven, in heaven."),
    )
    config = {"type": "orchestra", "workers": WORKERS, "planner": {"instructions": "Be thrifty."}}
    with Server(decide=decide).running() as server:
        ran = run_agent(make_context, agents, server.url, config=config)
        assert "Be thrifty." in server.requests[0].body["messages"][0]["content"]
        assert "- reader: Reads files." in server.requests[0].body["messages"][0]["content"]
        offered = {tool["function"]["name"] for tool in server.requests[1].body["tools"]}
    assert ran.output == "Seven, in heaven."
    assert offered == {"read_file", "write_file", "list_files", "final_answer"}
    assert "find the number" in asked["reader"]
    assert "this is the first step" in asked["reader"]
    assert "do it" in asked["writer"]
    assert "the number is 7" in asked["writer"]
    assert "seven in heaven" in asked["report"]
    assert [entry["agent"] for entry in ran.events("model")] == ["planner", "reader", "writer", "reporter"]
    assert ran.events("plan")[0]["steps"][1] == {"task": "make a verse of it", "worker": "writer"}
    assert ran.result["metadata"]["agent_type"] == "orchestra"


def test_a_worker_out_of_turns_is_told_to_the_reporter(agents, make_context) -> None:
    told: list[str] = []

    def report(_body: dict[str, Any], user: str) -> Step:
        told.append(user)
        return Say("Only half.")

    decide = parts(
        planner=plan(("reader", "look")),
        reader=lambda body, _user: call("list_files") if "tools" in body else Say("not found yet"),
        report=report,
    )
    with Server(decide=decide).running() as server:
        ran = run_agent(make_context, agents, server.url, config={"type": "orchestra", "workers": WORKERS})
    assert ran.output == "Only half."
    assert "1. look (not finished)\nnot found yet" in told[0]
    assert ran.items[0]["problems"] == ["step 1 was not finished: reader gave no answer in 3 turns (max_turns)"]


def test_a_plan_that_cannot_be_used_is_asked_for_again(agents, make_context) -> None:
    plans = ["I would rather chat.", '[{"worker": "raeder", "task": "x"}]', '[{"worker": "reader", "task": "x"}]']
    told: list[str] = []

    def planner(_body: dict[str, Any], user: str) -> Step:
        told.append(user)
        return Say(plans[len(told) - 1])

    decide = parts(planner=planner, reader=lambda *_: answer("y"), report=lambda *_: Say("z"))
    with Server(decide=decide).running() as server:
        ran = run_agent(make_context, agents, server.url, config={"type": "orchestra", "workers": WORKERS})
    assert ran.output == "z"
    assert "there is no JSON list" in told[1]
    assert "'raeder' is not a member of the team; did you mean 'reader'" in told[2]
    assert len(ran.events("error")) == 2


def test_no_plan_at_all_ends_the_run(agents, make_context) -> None:
    with Server(decide=parts(planner=lambda *_: Say("no"))).running() as server:
        ctx = agent_context(make_context, agents, server.url, config={"type": "orchestra", "workers": WORKERS})
        with pytest.raises(RunnerError, match="the planner gave no usable answer in 3 attempts"):
            AgentRunner().run(ctx)


def test_a_plan_is_cut_to_its_limit(agents, make_context, caplog) -> None:
    told: list[str] = []

    def report(_body: dict[str, Any], user: str) -> Step:
        told.append(user)
        return Say("z")

    decide = parts(
        planner=plan(*[("writer", f"step {n}") for n in range(9)]),
        writer=lambda *_: answer("y"),
        report=report,
    )
    config = {"type": "orchestra", "workers": WORKERS, "planner": {"max_steps": 2}}
    with Server(decide=decide).running() as server:
        ran = run_agent(make_context, agents, server.url, config=config)
    assert [entry["task"] for entry in ran.events("step_done")] == ["step 0", "step 1"]
    assert "The other 7 steps of the plan were not done" in told[0]
    assert "item 0: the plan has 9 steps, and only the first 2 were done (planner.max_steps)" in caplog.text


def test_a_workforce_assigns_reviews_and_tries_again(agents, make_context) -> None:
    seen: list[str] = []

    def writer(_body: dict[str, Any], user: str) -> Step:
        seen.append(user)
        return answer("better" if "not good enough" in user else "bad")

    def review(_body: dict[str, Any], user: str) -> Step:
        good = "better" in user or "found" in user
        return Say(json.dumps({"done": good, "feedback": "" if good else "too short"}))

    decide = parts(
        breakdown=lambda *_: Say('[{"task": "look around"}, {"task": "write it down"}]'),
        assign=lambda _body, user: Say(json.dumps({"worker": "writer" if "write" in user else "reader"})),
        reader=lambda *_: answer("found"),
        writer=writer,
        review=review,
        report=lambda _body, user: Say("ok" if "better" in user and "not finished" not in user else "?"),
    )
    with Server(decide=decide).running() as server:
        ran = run_agent(make_context, agents, server.url, config={"type": "workforce", "workers": WORKERS})
    assert ran.output == "ok"
    assert [entry["worker"] for entry in ran.events("assign")] == ["reader", "writer"]
    assert [entry["done"] for entry in ran.events("review")] == [True, False, True]
    assert "too short" in seen[1]
    assert "found" in seen[0]


def test_a_step_that_stays_bad_is_reported_so(agents, make_context) -> None:
    told: list[str] = []

    def report(_body: dict[str, Any], user: str) -> Step:
        told.append(user)
        return Say("It did not work out.")

    decide = parts(
        breakdown=lambda *_: Say('[{"task": "write"}]'),
        writer=lambda *_: answer("bad"),
        review=lambda *_: Say('{"done": false, "feedback": "no"}'),
        report=report,
    )
    config = {"type": "workforce", "workers": {"writer": WORKERS["writer"]}, "planner": {"max_attempts": 3}}
    with Server(decide=decide).running() as server:
        ran = run_agent(make_context, agents, server.url, config=config)
    assert ran.output == "It did not work out."
    assert len(ran.events("review")) == 3
    assert "1. write (not finished)" in told[0]
    assert "3 attempts, and the reviewer accepted none" in ran.items[0]["problems"][0]


def test_an_endpoint_that_fails_in_the_middle_fails_the_run(agents, make_context) -> None:
    decide = parts(planner=plan(("reader", "x")), reader=lambda *_: Fail(400, "{}"))
    with Server(decide=decide).running() as server:
        ctx = agent_context(make_context, agents, server.url, config={"type": "orchestra", "workers": WORKERS})
        with pytest.raises(RunnerError, match="answered 400"):
            AgentRunner().run(ctx)
