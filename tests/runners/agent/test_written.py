"""JSON in what models write: which of it is a call, which a plan, and which is only text. Never what is in thinking."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

pytest.importorskip("smolagents", reason="needs the extra 'agent'")

from runners.agent.runner import AgentRunner
from runners.agent.written import json_values, without_thinking, written_calls
from runners.api import RunnerError
from tests.kit.agent_support import agent_context, run_agent
from tests.kit.openai_server import Say, Server, Step, answer
from tests.kit.paths import CONF

CALL = '{"name": "write_file", "arguments": {"path": "made", "content": "x"}}'
NATIVE = {"tools": {"files": True}}
WRITTEN = {"tools": {"files": True}, "model": {"tool_choice": "none"}}
"""The text protocol: no tools in the request, calls as JSON in the text."""

ANSWERS = [
    (f"<think>I could run {CALL}</think>The answer is 4.", "The answer is 4."),
    (f"<think>\n{CALL}\n</think>\n\nThe answer is 4.", "The answer is 4."),
    (f"<thinking>\n{CALL}\n</thinking><think>{CALL}</think>The answer is 4.", "The answer is 4."),
    (f"[THINK]\n{CALL}\n[/THINK]The answer is 4.", "The answer is 4."),
    (f"I could run\n{CALL}\n</think>The answer is 4.", "The answer is 4."),
    (f"<think>a <think> tag\n</think>\n{CALL}\n</think>The answer is 4.", "The answer is 4."),
    (f"Such a call is {CALL} and it is not made.", None),
    (f"An example:\n```json\n{CALL}\n```\nThat is how.", None),
    (f"An example:\n```json\n{CALL}\n```", None),
    (f"{CALL}\nis how a call looks.", None),
    (f'[{CALL}]', None),
    (f'{{"calls": [\n{CALL}\n]}}', None),
    ('{"name": "Ada", "born": 1815}', None),
    ('{"name": "write_file", "arguments": {"path": "made", "content": "x"}, "note": "no call"}', None),
    ("Use the <think> tag for thinking.", None),
    ("It ends with `</think>`, always.", None),
]  # fmt: skip


@pytest.mark.parametrize("config", [NATIVE, WRITTEN], ids=["native", "written"])
@pytest.mark.parametrize(("text", "output"), ANSWERS)
def test_json_in_an_answer_is_no_call_and_the_answer_is_kept(text, output, config, tmp_path, make_context) -> None:
    with Server(Say(text)).running() as server:
        ran = run_agent(make_context, tmp_path / "agents", server.url, config=config)
    assert ran.output == (text if output is None else output)
    assert ran.items[0]["finish_reason"] == "completed"
    assert ran.events("tool_call") == []
    assert not (ran.ctx.out_dir / "workspace").exists()
    assert ran.events("model")[0]["text"] == text


@pytest.mark.parametrize(
    "text",
    [
        f"The answer is 4.\n{CALL}",
        f"The answer is 4. {CALL}",
        CALL,
        f"```json\n{CALL}\n```",
        f"<tool_call>\n{CALL}\n</tool_call>",
    ],
)  # fmt: skip
def test_with_native_calls_no_text_is_a_call(text, tmp_path, make_context) -> None:
    with Server(Say(text)).running() as server:
        ran = run_agent(make_context, tmp_path / "agents", server.url, config=NATIVE)
    assert ran.output == text
    assert ran.events("tool_call") == []


def test_native_calls_beside_thinking_are_made(tmp_path, make_context) -> None:
    first = Say(f"<think>{CALL}</think>I list.", (("list_files", {}),))
    with Server(first, answer("Nothing there.")).running() as server:
        ran = run_agent(make_context, tmp_path / "agents", server.url, config=NATIVE)
        assert server.requests[1].body["messages"][2]["content"] == "I list."
    assert [entry["tool"] for entry in ran.events("tool_call")] == ["list_files"]


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"<think>I write.</think>{CALL}",
        f"I write.\n{CALL}",
        f"```json\n{CALL}\n```",
        f"```\n{json.dumps(json.loads(CALL), indent=2)}\n```",
        f'<think>{{"name": "list_files", "arguments": {{}}}}</think>\n{CALL}\n',
        f"{CALL}\nObservation: made written\nThe answer is 4.",
        f'{{"a": 1}}\n{CALL}',
    ],
)
def test_the_text_protocol_has_calls_at_the_end_of_a_text(text, tmp_path, make_context) -> None:
    with Server(Say(text), Say("Done.")).running() as server:
        ran = run_agent(make_context, tmp_path / "agents", server.url, config=WRITTEN)
        assert "made written" in server.requests[1].body["messages"][-1]["content"]
    assert ran.output == "Done."
    assert [entry["tool"] for entry in ran.events("tool_call")] == ["write_file"]
    assert (ran.ctx.out_dir / "workspace" / "made").read_text() == "x"


def test_two_written_calls_are_both_made(tmp_path, make_context) -> None:
    with Server(Say(f"{CALL}\n{CALL.replace('made', 'too')}"), Say("Done.")).running() as server:
        ran = run_agent(make_context, tmp_path / "agents", server.url, config=WRITTEN)
        told = server.requests[1].body["messages"][-1]["content"]
    assert "made written" in told
    assert "too written" in told
    assert [entry["tool"] for entry in ran.events("tool_call")] == ["write_file", "write_file"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (CALL[:-9], "cut off before their end"),
        (CALL.replace('"path":', "path:"), "not valid JSON"),
        (CALL.replace('{"path": "made", "content": "x"}', '"made"'), "JSON, but not an object: a string"),
        (CALL.replace('{"path": "made", "content": "x"}', "[]"), "JSON, but not an object: a list"),
    ],
)
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_written_call_that_cannot_be_read_is_reported_to_the_model(
    text, said, finish, tmp_path, make_context
) -> None:
    with Server(Say(text, finish=finish), Say("Done.")).running() as server:
        ran = run_agent(make_context, tmp_path / "agents", server.url, config=WRITTEN)
        told = server.requests[1].body["messages"][-1]["content"]
    assert "the call was not run" in told
    assert said in told
    assert ran.output == "Done."
    assert not (ran.ctx.out_dir / "workspace").exists()


def test_a_text_that_is_cut_off_is_no_answer_in_the_text_protocol_either(tmp_path, make_context) -> None:
    cut = Server(Say("The answer is fo", finish="length"))
    with cut.running() as server, pytest.raises(RunnerError, match="length: the answer was cut off"):
        run_agent(make_context, tmp_path / "agents", server.url, config=WRITTEN)


def team(*, workers: tuple[str, ...] = ("a", "b"), **replies: Any) -> tuple[dict[str, Any], Any]:
    """A team, and an endpoint that plays its parts: each from its list of texts, the last one again and again."""
    marks = {"planner": "You plan how a team", "breakdown": "You coordinate a team", "assign": "You assign a step",
             "review": "You check whether a step", "report": "You write the final answer"}  # fmt: skip

    def decide(body: dict[str, Any]) -> Step:
        role = next((role for role, mark in marks.items() if mark in body["messages"][0]["content"]), "member")
        texts = replies.get(role, [Say("I did it.")])
        step = texts.pop(0) if len(texts) > 1 else texts[0]
        return step if isinstance(step, Say) else Say(step)

    members = {name: {"description": name, "instructions": f"You are {name}."} for name in workers}
    return {"workers": members}, decide


PLAN = '[{"worker": "a", "task": "look"}]'


@pytest.mark.parametrize(
    "plan",
    [
        f'<think>Perhaps [{{"worker": "b", "task": "guess"}}]? No.</think>{PLAN}',
        f"See [1]. The plan:\n```json\n{PLAN}\n```",
        f'{{"steps": {PLAN}}}',
        f"{PLAN}\nAgain: {PLAN}",
    ],
)
def test_a_plan_is_read_outside_the_thinking(plan, tmp_path, make_context) -> None:
    config, decide = team(planner=[plan], report=["<think>Hm.</think>All done."])
    with Server(decide=decide).running() as server:
        ran = run_agent(make_context, tmp_path / "agents", server.url, config={**config, "type": "orchestra"})
    assert [entry["steps"] for entry in ran.events("plan")] == [[{"task": "look", "worker": "a"}]]
    assert ran.output == "All done."


def test_of_several_plans_none_is_taken(tmp_path, make_context) -> None:
    both = f'For example [{{"worker": "b", "task": "guess"}}]. Mine: {PLAN}'
    config, decide = team(planner=[both, PLAN])
    with Server(decide=decide).running() as server:
        ran = run_agent(make_context, tmp_path / "agents", server.url, config={**config, "type": "orchestra"})
        assert "more than one JSON list of steps" in server.requests[1].body["messages"][1]["content"]
    assert ran.events("plan")[0]["steps"][0]["task"] == "look"


def test_assignments_and_reviews_are_read_outside_the_thinking(tmp_path, make_context) -> None:
    config, decide = team(
        breakdown=['<think>[{"task": "no"}]</think>[{"task": "look"}]'],
        assign=['<think>{"worker": "a"}, or?</think>{"worker": "b"}'],
        review=['<think>{"done": true, "feedback": ""}?</think>{"done": false, "feedback": "no"}', '{"done": true}'],
    )
    with Server(decide=decide).running() as server:
        ran = run_agent(make_context, tmp_path / "agents", server.url, config={**config, "type": "workforce"})
    assert [entry["worker"] for entry in ran.events("assign")] == ["b"]
    assert [entry["done"] for entry in ran.events("review")] == [False, True]


@pytest.mark.parametrize(
    ("kind", "role"),
    [
        *(("orchestra", role) for role in ("planner", "member", "report")),
        *(("workforce", role) for role in ("breakdown", "member", "review", "report")),
    ],
)
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (Say("I be", finish="length"), "length: the answer was cut off"),
        (Say("I be", finish="content_filter"), "content_filter: "),
        (Say(refusal="No."), "refusal: the model refused: No."),
        (Say(""), "empty: the answer has neither text nor a call"),
    ],
)
def test_no_part_of_a_team_completes_without_an_answer(kind, role, bad, said, tmp_path, make_context) -> None:  # noqa: PLR0917
    replies: dict[str, Any] = {"planner": [PLAN], "breakdown": ['[{"task": "look"}]'], "assign": ['{"worker": "a"}'],
                               "review": ['{"done": true}']}  # fmt: skip
    replies[role] = [bad]
    config, decide = team(**replies)
    with Server(decide=decide).running() as server:
        ctx = agent_context(make_context, tmp_path / "agents", server.url, config={**config, "type": kind})
        with pytest.raises(RunnerError) as caught:
            AgentRunner().run(ctx)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("stream", [False, True])
def test_an_endpoint_of_the_tasks_own_is_judged_alike(stream, tmp_path, make_context, monkeypatch) -> None:
    """`serve` with the scripted endpoint, which answers a streamed request whole. No proxy stands in front of it."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    replies = [
        {"when": {"user": "long"}, "text": "The answer is fo", "finish_reason": "length"},
        {"text": f"<think>{CALL}</think>The answer is 4."},
    ]
    script = tmp_path / "script.yaml"
    script.write_text(yaml.safe_dump({"replies": replies}))
    command = ["{python}", "-m", "runners.agent.scripted_endpoint", "--port", "{port}", "--script", str(script)]
    config = {**NATIVE, "model": {"base_url": None, "serve": {"command": command}, "stream": stream}}
    spec = {"data": {"type": "list", "items": ["a short one", "a long one"]}}
    ran = run_agent(make_context, tmp_path / "agents", "", config=config, spec=spec)
    assert [item["output"] for item in ran.items] == ["The answer is 4.", "The answer is fo"]
    assert [item["finish_reason"] for item in ran.items] == ["completed", "failed"]
    assert ran.items[1]["error"].startswith("length: ")
    assert ran.events("tool_call") == []


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('{"a": 1}', [{"a": 1}]),
        ('Sure! {"a": {"b": "}"}} and more {"c": 2}', [{"a": {"b": "}"}}, {"c": 2}]),
        ('```json\n{"a": 1}\n```\nnot {"b": 2}', [{"a": 1}]),
        ("{not json} [also not] [3]", []),
        ('[{"a": 1}, {"a": 1}]', [{"a": 1}]),
        ('<think>{"a": 1}</think>', []),
        ('<think>{"a": 1}', []),
        ("nothing", []),
        ('{"open": ', []),
    ],
)  # fmt: skip
def test_json_values(text, values) -> None:
    assert json_values(text, lambda value: isinstance(value, dict)) == values


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>a</think>b", "b"),
        ("<think>a</think>\n<think>b</think>\nc", "c"),
        ("<think>a", ""),
        ("a\n</think>b", "b"),
        ("Write </think> there, and\nno `</think>` here.", "Write </think> there, and\nno `</think>` here."),
        ("Write <think>a</think> so.", "Write <think>a</think> so."),
        ("plain", "plain"),
    ],
)
def test_thinking_before_an_answer_is_taken_away(text, left) -> None:
    assert without_thinking(text) == left


def test_long_texts_take_no_long_time() -> None:
    """A few hundred kilobytes of openings, which a careless search would read again for each of them."""
    blank = "```\n" + " " * 200_000 + "\n" * 200_000
    for text in (blank, "<think>" * 50_000, "{" * 200_000, "a" * 500_000 + "<", '{"a":\n' * 50_000):
        without_thinking(text)
        assert written_calls(text) == []
        json_values(text, lambda value: False)


def test_the_folder_of_the_examples_has_no_call_in_a_text() -> None:
    """Their scripts are answers too: a call in a text would now be one no more."""
    for script in (CONF / "agents" / "scripts").glob("*.yaml"):
        for rule in yaml.safe_load(script.read_text())["replies"]:
            assert '"arguments"' not in rule.get("text", "")
