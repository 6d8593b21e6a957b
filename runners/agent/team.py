"""Several agents on one task. `orchestra`: a plan, its steps in order, a report. `workforce`: steps that are assigned,
done, reviewed and if need be done again, then a report. Plans, assignments and reviews are the model's, as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from flowmesh.validation.convert import nearest
from runners.agent import prompts
from runners.agent.config import AgentConfig
from runners.agent.models import first_json
from runners.agent.solo import Bench, Member, Said, listen, work
from runners.api import RunnerError

T = TypeVar("T")
BEFORE_CHARS = 8000
"""Of what earlier steps found, that a later one is told."""
ASKED = 3
"""How often the model is asked for JSON before the run gives up on it."""


class Step(msgspec.Struct, frozen=True):
    """One step of a plan."""

    task: str
    worker: str | None = None


class Done(msgspec.Struct, frozen=True):
    """What came of a step."""

    step: Step
    text: str
    ok: bool


class Unusable(ValueError):
    """The model's JSON is not what was asked for. The message goes back to it."""


def orchestra(config: AgentConfig, members: Mapping[str, Member], task: str, bench: Bench) -> Said:
    """Plan, work, report.

    Raises:
        RunnerError: the model makes no plan, or cannot be asked.
        Cancelled, OutOfTime: as the bench's watch says.
    """
    system = prompts.PLAN.format(
        members=_listed(config), max_steps=config.planner.max_steps, instructions=config.planner.instructions
    )
    steps = _ask(bench, "planner", system, task, lambda text: _steps(text, config, members, with_worker=True))
    bench.note("planner", "plan", steps=msgspec.to_builtins(steps))
    done: list[Done] = []
    for step in steps:
        done.append(_do(members[step.worker or ""], step, task, done, bench))
    return _report(config, task, done, bench)


def workforce(config: AgentConfig, members: Mapping[str, Member], task: str, bench: Bench) -> Said:
    """Break down, and for each step: assign, work, review; then report.

    Raises:
        RunnerError: the model makes no plan, or cannot be asked.
        Cancelled, OutOfTime: as the bench's watch says.
    """
    planner = config.planner
    listed = _listed(config)
    system = prompts.BREAK_DOWN.format(members=listed, max_steps=planner.max_steps, instructions=planner.instructions)
    steps = _ask(bench, "coordinator", system, task, lambda text: _steps(text, config, members, with_worker=False))
    bench.note("coordinator", "plan", steps=msgspec.to_builtins(steps))
    assigning = prompts.ASSIGN.format(members=listed, instructions=planner.instructions)
    done: list[Done] = []
    for step in steps:
        name = next(iter(members))
        if len(members) > 1:
            name = _ask(bench, "coordinator", assigning, step.task, lambda text: _worker(text, members))
        bench.note("coordinator", "assign", worker=name, task=step.task)
        done.append(_until_good(config, members[name], step, task=task, before=done, bench=bench))
    return _report(config, task, done, bench)


def _until_good(
    config: AgentConfig, member: Member, step: Step, *, task: str, before: list[Done], bench: Bench
) -> Done:
    """Do a step, have it reviewed, and do it again with the review, as often as the configuration allows."""
    system = prompts.REVIEW.format(instructions=config.planner.instructions)
    wanted = step.task
    for _attempt in range(config.planner.max_attempts):
        result = _do(member, msgspec.structs.replace(step, task=wanted), task, before, bench)
        question = f"The step:\n{step.task}\n\nWhat the member delivered:\n{result.text}"
        good, feedback = _ask(bench, "reviewer", system, question, _verdict)
        bench.note("reviewer", "review", done=good, feedback=feedback)
        if good and result.ok:
            return msgspec.structs.replace(result, step=step)
        wanted = (
            f"{step.task}\n\nA first attempt was not good enough: {feedback}\nIt was:\n{result.text[:BEFORE_CHARS]}"
        )
    return Done(step, result.text, ok=False)


def _do(member: Member, step: Step, task: str, before: list[Done], bench: Bench) -> Done:
    found = _told(before)[-BEFORE_CHARS:] or "(this is the first step)"
    said = work(member, prompts.STEP.format(task=task, before=found, part=step.task), bench)
    bench.note(member.name, "step_done", task=step.task, result=said.text, ok=not said.out_of_turns)
    return Done(step, said.text, ok=not said.out_of_turns)


def _report(config: AgentConfig, task: str, done: list[Done], bench: Bench) -> Said:
    system = prompts.REPORT.format(instructions=config.reporter.instructions)
    listen(bench, "reporter")
    text = bench.model.say(system, f"The task:\n{task}\n\nThe team's work:\n{_told(done)}")
    return Said(bench.redact(text.strip()), out_of_turns=False)


def _told(done: list[Done]) -> str:
    lines = []
    for number, each in enumerate(done, start=1):
        mark = "" if each.ok else " (not finished)"
        lines.append(f"{number}. {each.step.task}{mark}\n{each.text}")
    return "\n\n".join(lines)


def _listed(config: AgentConfig) -> str:
    return "\n".join(f"- {name}: {worker.description}" for name, worker in config.workers.items())


def _ask(bench: Bench, agent: str, system: str, question: str, read: Callable[[str], T]) -> T:
    """The model's JSON, read. What is wrong with it is told back to it, a few times."""
    asked = question
    listen(bench, agent)
    for _ in range(ASKED):
        bench.watch.check()
        text = bench.model.say(system, asked)
        try:
            return read(text)
        except Unusable as error:
            bench.note(agent, "error", error=str(error))
            asked = f"{question}\n\nYour last answer could not be used: {error}. Answer again, with the JSON alone."
            why = error
    raise RunnerError(f"the {agent} gave no usable answer in {ASKED} attempts; the last: {why}")


def _steps(text: str, config: AgentConfig, members: Mapping[str, Member], *, with_worker: bool) -> list[Step]:
    value = first_json(text, list)
    if not isinstance(value, list) or not value:
        raise Unusable("there is no JSON list of steps in it")
    steps = []
    for index, each in enumerate(value[: config.planner.max_steps]):
        task = each.get("task") if isinstance(each, dict) else None
        if not isinstance(task, str) or not task.strip():
            raise Unusable(f"step {index} has no task")
        steps.append(Step(task.strip(), _known(each.get("worker"), members) if with_worker else None))
    return steps


def _worker(text: str, members: Mapping[str, Member]) -> str:
    value = first_json(text, dict)
    return _known(value.get("worker") if isinstance(value, dict) else None, members)


def _known(name: Any, members: Mapping[str, Member]) -> str:
    if name not in members:
        raise Unusable(f"{name!r} is no member of the team; {nearest(str(name), list(members))}")
    return str(name)


def _verdict(text: str) -> tuple[bool, str]:
    value = first_json(text, dict)
    if not isinstance(value, dict) or not isinstance(value.get("done"), bool):
        raise Unusable('there is no JSON object with a boolean "done" in it')
    return value["done"], str(value.get("feedback") or "")
