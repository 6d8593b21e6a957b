"""One agent: smolagents' loop of model turns and tool calls, recorded in the journal."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from smolagents.agents import ToolCallingAgent, ToolOutput
from smolagents.memory import ActionStep, FinalAnswerStep, TaskStep, ToolCall
from smolagents.models import ChatMessage
from smolagents.monitoring import LogLevel
from smolagents.utils import AgentError, AgentGenerationError, AgentMaxStepsError, AgentToolCallError

from flowmesh.redaction import Redactor
from runners.agent import prompts
from runners.agent.journal import Journal
from runners.agent.models import AgentModel
from runners.agent.tools import ToolSpec, adapt
from runners.agent.watch import Watch
from runners.agent.written import Malformed
from runners.api import RunnerError

PARALLEL_TOOLS = 4
FINAL = "final_answer"


class Outcome(msgspec.Struct, frozen=True):
    """The outcome of one agent's run."""

    text: str
    out_of_turns: bool
    """Whether it had used all its turns and was asked to conclude."""
    problems: tuple[str, ...] = ()
    """What a team left undone, and went on to report."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """An agent of the configuration."""

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
    """Gives each call of a turn its own result, and keeps both as messages of the chat API where calls are native."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._results: dict[int, dict[str, str]] = {}
        """By turn and call."""
        self.failed_conclusion = ""
        """Why the model gave no answer after its last turn."""

    def provide_final_answer(self, task: str) -> ChatMessage:
        """See smolagents, which gives an error's text, as a list of parts, for the answer."""
        message = super().provide_final_answer(task)
        if isinstance(message.content, list):
            self.failed_conclusion, message.content = _as_text(message.content), ""
        return message

    def process_tool_calls(self, chat_message: ChatMessage, memory_step: ActionStep) -> Iterator[ToolCall | ToolOutput]:
        """See smolagents, which joins all results into one text in the order of the calls' ids, and drops them if one
        call fails."""
        results = self._results.setdefault(memory_step.step_number, {})
        several = len(chat_message.tool_calls or ()) > 1
        process = self._side_by_side if several else super().process_tool_calls
        for event in process(chat_message, memory_step):
            if isinstance(event, ToolOutput) and not event.is_final_answer:
                results[event.id] = event.observation
            yield event

    def _side_by_side(self, message: ChatMessage, step: ActionStep) -> Iterator[ToolCall | ToolOutput]:
        """The calls of one turn, then their results in the same order."""
        calls = [
            ToolCall(name=call.function.name, arguments=call.function.arguments, id=call.id)
            for call in message.tool_calls or ()
        ]
        yield from calls
        outputs: list[ToolOutput] = []
        with ThreadPoolExecutor(self.max_tool_threads) as pool:
            for future in [pool.submit(self._output, call) for call in calls]:
                outputs.append(future.result())
                if not outputs[-1].is_final_answer:
                    yield outputs[-1]
        step.tool_calls = calls
        step.observations = "\n".join(output.observation for output in outputs)
        yield from (
            output for output in outputs if output.is_final_answer
        )  # refused beside other calls, which ends the turn

    def execute_tool_call(self, tool_name: str, arguments: Any) -> Any:
        """See smolagents, which hands a text that is no JSON object to a tool of one argument as that argument."""
        if isinstance(arguments, Malformed):
            raise AgentToolCallError(arguments.why, self.logger)
        if tool_name == FINAL and isinstance(arguments, dict) and _is_blank(arguments.get("answer", FINAL)):
            raise AgentToolCallError("the answer is empty; call final_answer with the whole answer", self.logger)
        return super().execute_tool_call(tool_name, arguments)

    def _output(self, call: ToolCall) -> ToolOutput:
        """The result of one call, or its failure as text for the model. Raises only what ends the run."""
        try:
            value = self.execute_tool_call(call.name, call.arguments or {})
        except AgentError as error:
            return ToolOutput(
                id=call.id, output=None, is_final_answer=False, observation=_failure(error), tool_call=call
            )
        is_final = call.name == FINAL
        text = str(value).strip()
        return ToolOutput(id=call.id, output=value, is_final_answer=is_final, observation=text, tool_call=call)

    def write_memory_to_messages(self, summary_mode: bool = False) -> list[Any]:
        """See smolagents."""
        if not self.model.native_calls:
            return super().write_memory_to_messages(summary_mode)
        messages: list[Any] = [{"role": "system", "content": self.memory.system_prompt.system_prompt}]
        for step in self.memory.steps:
            if isinstance(step, TaskStep):
                messages.append({"role": "user", "content": step.task})
            elif isinstance(step, ActionStep) and step.model_output_message is not None:
                messages += _turn(step, self._results.get(step.step_number, {}))
        return messages


def work(member: Member, task: str, bench: Bench) -> Outcome:
    """Run an agent on a task.

    Raises:
        RunnerError: its model gives no answer.
        Cancelled, OutOfTime: from the bench's watch.
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
    recorded = 0
    listen(bench, member.name)
    try:
        for event in agent.run(task, stream=True):
            bench.watch.check()
            match event:
                case ToolCall():
                    if event.name != FINAL:
                        bench.note(member.name, "tool_call", tool=event.name, arguments=event.arguments)
                case ToolOutput():
                    if not event.is_final_answer:
                        bench.note(member.name, "tool_result", tool=event.tool_call.name, result=event.observation)
                case ActionStep() if event.step_number > recorded:
                    recorded = event.step_number
                    if event.error is not None and not isinstance(event.error, AgentGenerationError):
                        bench.note(member.name, "error", turn=recorded, error=str(event.error))
                case FinalAnswerStep():
                    output = event.output
    except AgentGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, RunnerError):
            raise cause from None
        raise RunnerError(f"the model request failed: {type(cause).__name__}: {cause}") from cause
    except AgentError as error:
        raise RunnerError(f"{type(error).__name__}: {error}") from error
    if agent.failed_conclusion:
        bench.note(member.name, "error", turn=recorded, error=agent.failed_conclusion)
    last = agent.memory.steps[-1] if agent.memory.steps else None
    out_of_turns = isinstance(getattr(last, "error", None), AgentMaxStepsError)
    return Outcome(bench.redact(_as_text(output)), out_of_turns)


def listen(bench: Bench, agent: str) -> None:
    """Record the model's answers under the name `agent` from now on."""
    turns = itertools.count(1)

    def record(text: str, usage: Any) -> None:
        tokens = {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}
        bench.note(agent, "model", turn=next(turns), text=text, **tokens)

    bench.model.listener = record


def _turn(step: ActionStep, results: Mapping[str, str]) -> list[dict[str, Any]]:
    """One turn as messages: the model's text and calls, and their results.

    Args:
        results: by id of the call; a call without one gets the turn's failure.
    """
    message = step.model_output_message
    assert message is not None, "checked by the caller"
    text = message.content if isinstance(message.content, str) else ""
    calls = message.tool_calls or []
    failure = "" if step.error is None else _failure(step.error)
    if not calls:
        return [{"role": "assistant", "content": text}, *([{"role": "user", "content": failure}] if failure else [])]
    turn = {
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
    outputs = [{"role": "tool", "tool_call_id": call.id, "content": results.get(call.id, failure)} for call in calls]
    return [turn, *outputs]


def _failure(error: AgentError) -> str:
    return f"Error: {error}"


def _as_json(arguments: dict[str, Any]) -> str:
    """Always an object: servers read the calls of earlier turns, and refuse the request where they cannot."""
    return "{}" if isinstance(arguments, Malformed) else json.dumps(arguments, ensure_ascii=False, default=str)


def _is_blank(answer: Any) -> bool:
    return answer is None or (isinstance(answer, str) and not answer.strip()) or answer in ([], {})


def _as_text(output: Any) -> str:
    if isinstance(output, str):
        return str(output).strip()
    if isinstance(output, list) and all(isinstance(part, dict) and "text" in part for part in output):
        return "\n".join(str(part["text"]) for part in output).strip()
    return "" if output is None else json.dumps(output, ensure_ascii=False, default=str)
