"""Several agents on one task. `orchestra`: plan, steps in order, report. `workforce`: steps that are assigned, done,
reviewed and repeated if needed, then a report. The model gives plans, assignments and reviews as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from flowmesh.validation.convert import nearest
from runners.agent import prompts
from runners.agent.config import AgentConfig
from runners.agent.solo import Bench, Member, Outcome, listen, work
from runners.agent.written import json_values
from runners.api import RunnerError

T = TypeVar("T")
BEFORE_CHARS = 8000
"""Of earlier steps' results, passed to a later one."""
ASKED = 3
"""Attempts to get usable JSON from the model."""


class Step(msgspec.Struct, frozen=True):
    """One step of a plan."""

    task: str
    worker: str | None = None


class Done(msgspec.Struct, frozen=True):
    """The result of a step."""

    step: Step
    text: str
    problem: str = ""
    """Why it is not finished; empty: it is."""


class Unusable(ValueError):
    """The model's JSON is not what was asked for. The message is sent to it."""


def orchestra(config: AgentConfig, members: Mapping[str, Member], task: str, bench: Bench) -> Outcome:
    """Plan, work, report.

    Raises:
        RunnerError: the model makes no plan, or gives no answer.
        Cancelled, OutOfTime: from the bench's watch.
    """
    system = prompts.PLAN.format(
        members=_listed(config), max_steps=config.planner.max_steps, instructions=config.planner.instructions
    )
    planned = _ask(bench, "planner", system, task, lambda text: _steps(text, members, with_worker=True))
    steps = planned[: config.planner.max_steps]
    bench.note("planner", "plan", steps=msgspec.to_builtins(steps))
    done: list[Done] = []
    for step in steps:
        done.append(_do(members[step.worker or ""], step, task, done, bench))
    return _report(config, task, done, bench, len(planned))


def workforce(config: AgentConfig, members: Mapping[str, Member], task: str, bench: Bench) -> Outcome:
    """Break down, and for each step: assign, work, review; then report.

    Raises:
        RunnerError: the model makes no plan, or gives no answer.
        Cancelled, OutOfTime: from the bench's watch.
    """
    planner = config.planner
    listed = _listed(config)
    system = prompts.BREAK_DOWN.format(members=listed, max_steps=planner.max_steps, instructions=planner.instructions)
    planned = _ask(bench, "coordinator", system, task, lambda text: _steps(text, members, with_worker=False))
    steps = planned[: planner.max_steps]
    bench.note("coordinator", "plan", steps=msgspec.to_builtins(steps))
    assigning = prompts.ASSIGN.format(members=listed, instructions=planner.instructions)
    done: list[Done] = []
    for step in steps:
        name = next(iter(members))
        if len(members) > 1:
            name = _ask(bench, "coordinator", assigning, step.task, lambda text: _worker(text, members))
        bench.note("coordinator", "assign", worker=name, task=step.task)
        done.append(_until_good(config, members[name], step, task=task, before=done, bench=bench))
    return _report(config, task, done, bench, len(planned))


def _until_good(
    config: AgentConfig, member: Member, step: Step, *, task: str, before: list[Done], bench: Bench
) -> Done:
    """Do a step and have it reviewed; repeat it with the review, up to planner.max_attempts times."""
    system = prompts.REVIEW.format(instructions=config.planner.instructions)
    wanted = step.task
    for _attempt in range(config.planner.max_attempts):
        result = _do(member, msgspec.structs.replace(step, task=wanted), task, before, bench)
        question = f"The step:\n{step.task}\n\nWhat the member delivered:\n{result.text}"
        good, feedback = _ask(bench, "reviewer", system, question, _verdict)
        bench.note("reviewer", "review", done=good, feedback=feedback)
        if good and not result.problem:
            return msgspec.structs.replace(result, step=step)
        wanted = (
            f"{step.task}\n\nA first attempt was not good enough: {feedback}\nIt was:\n{result.text[:BEFORE_CHARS]}"
        )
    attempts = config.planner.max_attempts
    why = f"{attempts} attempts, and the reviewer accepted none (planner.max_attempts)"
    return Done(step, result.text, result.problem or why)


def _do(member: Member, step: Step, task: str, before: list[Done], bench: Bench) -> Done:
    found = _results(before) or "(this is the first step)"
    if len(found) > BEFORE_CHARS:
        found = f"({len(found) - BEFORE_CHARS} characters of earlier steps left out) …{found[-BEFORE_CHARS:]}"
    outcome = work(member, prompts.STEP.format(task=task, before=found, part=step.task), bench)
    bench.note(member.name, "step_done", task=step.task, result=outcome.text, ok=not outcome.out_of_turns)
    why = f"{member.name} gave no answer in {member.max_turns} turns (max_turns)" if outcome.out_of_turns else ""
    return Done(step, outcome.text, why)


def _report(config: AgentConfig, task: str, done: list[Done], bench: Bench, planned: int) -> Outcome:
    """
    Args:
        planned: the plan's steps; those beyond `done` were left out.
    """
    system = prompts.REPORT.format(instructions=config.reporter.instructions)
    listen(bench, "reporter")
    problems = [
        f"step {number} was not finished: {each.problem}" for number, each in enumerate(done, start=1) if each.problem
    ]
    work = _results(done)
    if planned > len(done):
        problems.append(f"the plan has {planned} steps, and only the first {len(done)} were done (planner.max_steps)")
        work += f"\n\n(The other {planned - len(done)} steps of the plan were not done.)"
    text = bench.model.say(system, f"The task:\n{task}\n\nThe team's work:\n{work}")
    return Outcome(bench.redact(text.strip()), out_of_turns=False, problems=tuple(problems))


def _results(done: list[Done]) -> str:
    lines = []
    for number, each in enumerate(done, start=1):
        mark = " (not finished)" if each.problem else ""
        lines.append(f"{number}. {each.step.task}{mark}\n{each.text}")
    return "\n\n".join(lines)


def _listed(config: AgentConfig) -> str:
    return "\n".join(f"- {name}: {worker.description}" for name, worker in config.workers.items())


def _ask(bench: Bench, agent: str, system: str, question: str, read: Callable[[str], T]) -> T:
    """Ask the model for JSON and parse it. Problems are sent back to the model, ASKED attempts in all."""
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


def _steps(text: str, members: Mapping[str, Member], *, with_worker: bool) -> list[Step]:
    value = _only(text, "list of steps", lambda value: isinstance(value, list) and bool(value) and _are_objects(value))
    steps = []
    for index, each in enumerate(value):
        task = each.get("task")
        if not isinstance(task, str) or not task.strip():
            raise Unusable(f"step {index} has no task")
        steps.append(Step(task.strip(), _known(each.get("worker"), members) if with_worker else None))
    return steps


def _worker(text: str, members: Mapping[str, Member]) -> str:
    value = _only(text, 'object with a "worker"', lambda value: isinstance(value, dict) and "worker" in value)
    return _known(value["worker"], members)


def _known(name: Any, members: Mapping[str, Member]) -> str:
    if name not in members:
        raise Unusable(f"{name!r} is not a member of the team; {nearest(str(name), list(members))}")
    return str(name)


def _verdict(text: str) -> tuple[bool, str]:
    value = _only(text, 'object with a boolean "done"', _is_verdict)
    return value["done"], str(value.get("feedback") or "")


def _only(text: str, what: str, fits: Callable[[Any], bool]) -> Any:
    """The one JSON value in a text that fits."""
    found = json_values(text, fits)
    if len(found) != 1:
        raise Unusable(f"there is {'more than one' if found else 'no'} JSON {what} in it")
    return found[0]


def _are_objects(values: list[Any]) -> bool:
    return all(isinstance(each, dict) for each in values)


def _is_verdict(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("done"), bool)
