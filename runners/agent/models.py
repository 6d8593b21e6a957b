"""The models that think, as smolagents wants them: an endpoint's, or one that runs in this process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from smolagents.models import (
    ChatMessage,
    ChatMessageToolCall,
    ChatMessageToolCallFunction,
    MessageRole,
    Model,
    get_clean_message_list,
    get_tool_json_schema,
    tool_role_conversions,
)
from smolagents.monitoring import TokenUsage

from runners.agent.config import Model as ModelConfig
from runners.agent.endpoint import Endpoint
from runners.agent.watch import Watch
from runners.api import Context
from runners.inference.engine import Request
from runners.inference.engine import Watch as GenerationWatch

STOP_WRITING = ("Observation:",)
DEFAULT_LOCAL_TOKENS = 1024


class AgentModel(Model):
    """Counts what it is asked, and takes text without a call for the final answer."""

    native_calls = True
    """Whether tools go with the request; else the prompt lists them."""

    def __init__(self, name: str) -> None:
        super().__init__(flatten_messages_as_text=True, model_id=name)
        self.requests = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.watch: Watch | None = None
        """The present run's."""
        self.listener: Callable[[str, TokenUsage], None] | None = None
        """Hears every answer, before anything is made of it."""

    def parse_tool_calls(self, message: ChatMessage) -> ChatMessage:
        """A call that the model wrote as JSON, else its text as the answer."""
        message.role = MessageRole.ASSISTANT
        text = message.content if isinstance(message.content, str) else ""
        name, arguments = written_call(text) or ("final_answer", {"answer": text.strip()})
        function = ChatMessageToolCallFunction(name=name, arguments=arguments)
        message.tool_calls = [ChatMessageToolCall(function=function, id=f"call_{self.requests}", type="function")]
        return message

    def say(self, system: str, user: str) -> str:
        """One answer without tools."""
        messages = [
            ChatMessage(role=MessageRole.SYSTEM, content=[{"type": "text", "text": system}]),
            ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": user}]),
        ]
        return str(self.generate(messages).content or "")

    def _answered(self, text: str, prompt_tokens: int, completion_tokens: int) -> TokenUsage:
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        usage = TokenUsage(input_tokens=prompt_tokens, output_tokens=completion_tokens)
        if self.listener is not None:
            self.listener(text, usage)
        return usage

    def _watch(self) -> Watch:
        assert self.watch is not None, "set before a run begins"
        return self.watch


class EndpointModel(AgentModel):
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, endpoint: Endpoint, wanted: ModelConfig, watch: Watch) -> None:
        super().__init__(endpoint.find_model(watch))
        self._endpoint = endpoint
        self._choice = wanted.tool_choice
        self.native_calls = wanted.tool_choice != "none"

    def generate(
        self,
        messages: Sequence[Any],
        stop_sequences: list[str] | None = None,  # noqa: ARG002 - smolagents passes it
        response_format: Any = None,
        tools_to_call_from: Sequence[Any] | None = None,
        **_: Any,
    ) -> ChatMessage:
        """See smolagents. Messages may also be an endpoint's own dictionaries."""
        tools = [schema_of(tool) for tool in tools_to_call_from or ()] if self.native_calls else []
        reply = self._endpoint.complete(
            self._watch(),
            plain_messages(messages),
            tools=tools or None,
            tool_choice=self._choice if tools else None,
            response_format=response_format,
            stop=None if self.native_calls or not tools_to_call_from else list(STOP_WRITING),
        )
        calls = [
            ChatMessageToolCall(
                function=ChatMessageToolCallFunction(name=call.name, arguments=_arguments(call.arguments)),
                id=call.id,
                type="function",
            )
            for call in reply.calls
        ]
        usage = self._answered(reply.content, reply.prompt_tokens, reply.completion_tokens)
        return ChatMessage(
            role=MessageRole.ASSISTANT, content=reply.content, tool_calls=_distinct(calls) or None, token_usage=usage
        )


class LocalModel(AgentModel):
    """A model that the inference runner's engine holds in this very process."""

    native_calls = False

    def __init__(self, ctx: Context, wanted: ModelConfig) -> None:
        """
        Raises:
            BadRequest: there is no such model.
            RunnerError: the model hub cannot be reached.
        """
        from runners.inference.engines import load_engine
        from runners.inference.runner import find_source
        from runners.inference.task import read_task
        from runners.inference.vllm_args import Work

        super().__init__(wanted.identifier or "")
        options = {name: getattr(wanted, name) for name in ("temperature", "top_p", "seed")}
        spec = {
            "model": {"source": {"identifier": wanted.identifier, "revision": wanted.revision}},
            "enforce_cpu": wanted.enforce_cpu,
            "inference": {**options, "max_tokens": wanted.max_tokens or DEFAULT_LOCAL_TOKENS, "stop": STOP_WRITING},
        }
        self._ctx = ctx
        self._task = read_task(ctx, spec, "model")
        work = Work(prompts=100, prompt_bytes=400_000, new_tokens=self._task.sampling.max_tokens, copies=1)
        self._engine, self._texts = load_engine(ctx, self._task, find_source(ctx, self._task), [], work=work)

    def generate(self, messages: Sequence[Any], *_: Any, **__: Any) -> ChatMessage:
        """See smolagents."""
        from runners.api import BadRequest
        from runners.data.prompts import Message

        turns = tuple(Message(each["role"], each["content"]) for each in plain_messages(messages))
        prompt = self._texts.encode([turns], ["the agent's messages"])[0]
        room = self._engine.max_positions
        if room is not None and len(prompt) + 1 >= room:
            raise BadRequest(
                f"model.identifier: the agent's messages have {len(prompt)} tokens, the model takes {room} with its "
                "answer; choose one with a longer context, or fewer tools and turns"
            )
        watch = _Listening(self._ctx, self._watch())
        output = self._engine.generate([Request(prompt)], self._task.sampling, watch)[0].outputs[0]
        usage = self._answered(output.text, len(prompt), len(output.token_ids))
        return ChatMessage(role=MessageRole.ASSISTANT, content=output.text, token_usage=usage)


class _Listening(GenerationWatch):
    """Also ends a generation when the run's own time is up."""

    def __init__(self, ctx: Context, watch: Watch) -> None:
        super().__init__(ctx, 1)
        self._run = watch

    def step(self, *, tokens: int = 0, answers: int = 0) -> None:
        self._run.check()
        super().step(tokens=tokens, answers=answers)


def plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """smolagents' messages as an endpoint takes them; what is such a dictionary already stays as it is."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        if isinstance(message, dict):
            plain.append(message)
            continue
        made = get_clean_message_list([message], role_conversions=tool_role_conversions, flatten_messages_as_text=False)
        for each in made:
            content = each["content"]
            text = content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content or ())
            role = getattr(each["role"], "value", each["role"])
            if plain and plain[-1]["role"] == role and "tool_calls" not in plain[-1] and role != "tool":
                plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{text}"}
            else:
                plain.append({"role": role, "content": text})
    return plain


def schema_of(tool: Any) -> dict[str, Any]:
    """A tool as the request describes it; one of an MCP server by that server's own schema."""
    schema = getattr(tool, "json_schema", None)
    if schema is None:
        return get_tool_json_schema(tool)
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": schema},
    }


_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


def written_call(text: str) -> tuple[str, Any] | None:
    """The call in a text such as `{"name": "shell", "arguments": {…}}`; None where there is none."""
    value = first_json(text, dict)
    if isinstance(value, dict) and isinstance(value.get("name"), str) and "arguments" in value:
        return value["name"], value["arguments"]
    return None


def first_json(text: str, kind: type[Any]) -> Any:
    """The first JSON value of that kind in a text, fenced or not; None where there is none."""
    decoder = json.JSONDecoder()
    opening = "{" if kind is dict else "["
    for part in (*_FENCE.findall(text), text):
        at = part.find(opening)
        while at >= 0:
            try:
                value, _ = decoder.raw_decode(part, at)
            except ValueError:
                pass
            else:
                if isinstance(value, kind):
                    return value
            at = part.find(opening, at + 1)
    return None


def _arguments(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else {}
    except ValueError:
        return text


def _distinct(calls: list[ChatMessageToolCall]) -> list[ChatMessageToolCall]:
    """smolagents keeps calls by their id; some servers give all the same."""
    if len({call.id for call in calls}) < len(calls):
        for index, call in enumerate(calls):
            call.id = f"{call.id}_{index}"
    return calls
