"""One agent at work: smolagents' loop of thinking and acting, its steps told to the journal."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import msgspec
from smolagents.agents import ToolCallingAgent, ToolOutput
from smolagents.memory import ActionStep, FinalAnswerStep, TaskStep, ToolCall
from smolagents.monitoring import LogLevel
from smolagents.utils import AgentError, AgentGenerationError, AgentMaxStepsError

from runners.agent import prompts
from runners.agent.journal import Journal
from runners.agent.models import AgentModel
from runners.agent.secrets import Redactor
from runners.agent.tools import ToolSpec, adapt
from runners.agent.watch import Watch
from runners.api import RunnerError

PARALLEL_TOOLS = 4
ELSEWHERE = "(see the result of the turn's first call)"


class Said(msgspec.Struct, frozen=True):
    """What an agent came to."""

    text: str
    out_of_turns: bool
    """Whether it was told to conclude, having used all its turns."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """An agent that can be put to work."""

    name: str
    instructions: str
    tools: Sequence[ToolSpec]
    max_turns: int


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """What all agents of one run share."""

    item: int
    model: AgentModel
    watch: Watch
    journal: Journal
    redact: Redactor

    def note(self, agent: str, event: str, **fields: Any) -> None:
        self.journal.note(self.item, agent, event, **fields)


class _Agent(ToolCallingAgent):
    """Remembers calls and results as the endpoint's own messages, where the model has them."""

    def write_memory_to_messages(self, summary_mode: bool = False) -> list[Any]:
        """See smolagents."""
        if not self.model.native_calls:
            return super().write_memory_to_messages(summary_mode)
        messages: list[Any] = [{"role": "system", "content": self.memory.system_prompt.system_prompt}]
        for step in self.memory.steps:
            if isinstance(step, TaskStep):
                messages.append({"role": "user", "content": step.task})
            elif isinstance(step, ActionStep) and step.model_output_message is not None:
                messages += _turn(step)
        return messages


def work(member: Member, task: str, bench: Bench) -> Said:
    """Have an agent do a task.

    Raises:
        RunnerError: its model cannot be asked.
        Cancelled, OutOfTime: as the bench's watch says.
    """
    model = bench.model
    agent = _Agent(
        tools=[adapt(spec, bench.watch, bench.redact) for spec in member.tools],
        model=model,
        prompt_templates=prompts.templates(native_calls=model.native_calls),
        instructions=member.instructions.strip() or None,
        max_steps=member.max_turns,
        verbosity_level=LogLevel.OFF,
        max_tool_threads=PARALLEL_TOOLS,
    )
    output: Any = None
    told = 0
    listen(bench, member.name)
    try:
        for event in agent.run(task, stream=True):
            bench.watch.check()
            match event:
                case ToolCall():
                    if event.name != "final_answer":
                        bench.note(member.name, "tool_call", tool=event.name, arguments=event.arguments)
                case ToolOutput():
                    if not event.is_final_answer:
                        bench.note(member.name, "tool_result", tool=event.tool_call.name, result=event.observation)
                case ActionStep() if event.step_number > told:
                    told = event.step_number
                    if event.error is not None and not isinstance(event.error, AgentGenerationError):
                        bench.note(member.name, "error", turn=told, error=str(event.error))
                case FinalAnswerStep():
                    output = event.output
    except AgentGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, RunnerError):
            raise cause from None
        raise RunnerError(f"the model could not be asked: {type(cause).__name__}: {cause}") from cause
    except AgentError as error:
        raise RunnerError(f"{type(error).__name__}: {error}") from error
    last = agent.memory.steps[-1] if agent.memory.steps else None
    out_of_turns = isinstance(getattr(last, "error", None), AgentMaxStepsError)
    return Said(bench.redact(_as_text(output)), out_of_turns)


def listen(bench: Bench, agent: str) -> None:
    """From now on what the model says is `agent`'s."""
    turns = itertools.count(1)

    def heard(text: str, usage: Any) -> None:
        tokens = {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}
        bench.note(agent, "model", turn=next(turns), text=text, **tokens)

    bench.model.listener = heard


def _turn(step: ActionStep) -> list[dict[str, Any]]:
    """One turn: what the model said and called, and what came of it."""
    message = step.model_output_message
    assert message is not None, "the caller has looked"
    text = message.content if isinstance(message.content, str) else ""
    calls = message.tool_calls or []
    came = "\n".join(
        part for part in (step.observations or "", f"Error: {step.error}" if step.error is not None else "") if part
    )
    if not calls:
        return [{"role": "assistant", "content": text}, *([{"role": "user", "content": came}] if came else [])]
    said = {
        "role": "assistant",
        "content": text,
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _as_json(call.function.arguments)},
            }
            for call in calls
        ],
    }
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": came if index == 0 else ELSEWHERE}
        for index, call in enumerate(calls)
    ]
    return [said, *results]


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)


def _as_text(output: Any) -> str:
    if isinstance(output, str):
        return str(output).strip()
    if isinstance(output, list) and all(isinstance(part, dict) and "text" in part for part in output):
        return "\n".join(str(part["text"]) for part in output).strip()
    return "" if output is None else json.dumps(output, ensure_ascii=False, default=str)
