"""The models that agents ask, as smolagents takes them: behind an endpoint, or in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
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

from flowmesh.messages.serving import Served
from runners.agent.completions import Call, Reply
from runners.agent.config import Model as ModelConfig
from runners.agent.endpoint import Endpoint
from runners.agent.watch import Watch
from runners.agent.written import OBSERVATION, begun_call, whole_answer, without_thinking, written_calls
from runners.api import Context, RunnerError
from runners.inference.engine import Request, collect
from runners.inference.engine import Watch as GenerationWatch

DEFAULT_LOCAL_TOKENS = 1024
FINISHED = frozenset(
    {"", "stop", "tool_calls", "eos", "eos_token", "end_turn", "stop_sequence", "tool_use", "complete"}
)
"""Finish reasons of complete answers, as the API and other servers name them; lower case."""
CUT_OFF = frozenset({"length", "max_tokens", "max_output_tokens", "model_length"})


class NoAnswer(RunnerError):
    """The model's answer was cut off, filtered, refused or empty. `text` holds the part that arrived."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


class AgentModel(Model):
    """Counts requests, and takes text without a call as the final answer."""

    native_calls = True
    """Whether tools are part of the request, and calls of the message; else the prompt lists tools, and the text holds
    calls."""

    def __init__(self, name: str) -> None:
        super().__init__(flatten_messages_as_text=True, model_id=name)
        self.weights = ""
        """Digest of a local model's."""
        self.requests = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.watch: Watch | None = None
        """Of the current run."""
        self.listener: Callable[[str, TokenUsage], None] | None = None
        """Called with each answer as received, before it is checked."""

    def parse_tool_calls(self, message: ChatMessage) -> ChatMessage:
        """Turn the text of an answer without calls into the final answer.

        Raises:
            ValueError: it begins like a written call, and cannot be parsed.
        """
        text = str(message.content or "")
        if self.native_calls:
            text = whole_answer(text)
        elif problem := begun_call(text):
            raise ValueError(f"the call was not run: it is {problem}")
        message.tool_calls = _tool_calls([Call(f"call_{self.requests}", "final_answer", {"answer": text})])
        return message

    def say(self, system: str, user: str) -> str:
        """One answer without tools.

        Raises:
            NoAnswer: the answer is incomplete or empty.
        """
        messages = [
            ChatMessage(role=MessageRole.SYSTEM, content=[{"type": "text", "text": system}]),
            ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": user}]),
        ]
        return str(self.generate(messages).content)

    def _checked(self, reply: Reply, *, with_tools: bool) -> ChatMessage:
        """Convert a reply for smolagents: its text without thinking, and its calls.

        Args:
            with_tools: whether tools were offered, as `native_calls` says.

        Raises:
            NoAnswer: the endpoint marks it as incomplete, or it is empty.
        """
        self.requests += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        usage = TokenUsage(input_tokens=reply.prompt_tokens, output_tokens=reply.completion_tokens)
        if self.listener is not None:
            self.listener(reply.content, usage)
        text = without_thinking(reply.content)
        calls: Sequence[Call] = ()
        if with_tools and self.native_calls:
            calls = reply.calls
        elif with_tools:
            written = written_calls(reply.content)
            calls = [Call(f"call_{self.requests}_{n}", *each) for n, each in enumerate(written)]
        begun = with_tools and not self.native_calls and begun_call(reply.content)
        if problem := _problem(reply, text, has_calls=bool(calls or begun)):
            raise NoAnswer(problem, text or reply.content.strip())
        return ChatMessage(
            role=MessageRole.ASSISTANT, content=text, tool_calls=_tool_calls(calls) or None, token_usage=usage
        )

    def _watch(self) -> Watch:
        assert self.watch is not None, "set before a run starts"
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
            stop=None if self.native_calls or not tools_to_call_from else [OBSERVATION],
        )
        return self._checked(reply, with_tools=bool(tools_to_call_from))


class LocalModel(AgentModel):
    """A model in this process, run by the inference runner's engine."""

    native_calls = False

    def __init__(self, ctx: Context, wanted: ModelConfig) -> None:
        """
        Raises:
            BadRequest: the model does not exist.
            RunnerError: the model hub cannot be reached.
        """
        from runners.inference.engines import load_engine
        from runners.inference.task import read_task
        from runners.inference.task_model import find_source
        from runners.inference.vllm_args import Work
        from runners.models.digest import weights_digest

        super().__init__(wanted.identifier or "")
        options = {name: getattr(wanted, name) for name in ("temperature", "top_p", "seed")}
        spec = {
            "model": {"source": {"identifier": wanted.identifier, "revision": wanted.revision}},
            "enforce_cpu": wanted.enforce_cpu,
            "inference": {**options, "max_tokens": wanted.max_tokens or DEFAULT_LOCAL_TOKENS, "stop": [OBSERVATION]},
        }
        self._ctx = ctx
        self._task = read_task(ctx, spec, "model")
        work = Work(prompts=100, prompt_bytes=400_000, new_tokens=self._task.sampling.max_tokens, copies=1)
        source = find_source(ctx, self._task)
        self.weights = weights_digest(source, source.path)
        self._engine, self._texts = load_engine(ctx, self._task, source, [], work=work)

    def generate(
        self, messages: Sequence[Any], *_: Any, tools_to_call_from: Sequence[Any] | None = None, **__: Any
    ) -> ChatMessage:
        """See smolagents."""
        from runners.api import BadRequest
        from runners.data.prompts import Message
        from runners.models.limits import check_token_ids

        turns = tuple(Message(each["role"], each["content"]) for each in plain_messages(messages))
        prompt = self._texts.encode([turns], ["the agent's messages"])[0]
        where = "model.identifier: the agent's messages"
        check_token_ids(prompt, self._engine.vocabulary, self._texts.tokenizer, where)
        room = self._engine.max_positions
        if room is not None and len(prompt) + 1 >= room:
            raise BadRequest(
                f"{where} have {len(prompt)} tokens, the model takes {room} with its "
                "answer; choose one with a longer context, or fewer tools and turns"
            )
        watch = _Listening(self._ctx, self._watch())
        output = collect(self._engine, [Request(prompt, self._task.sampling)], watch)[0].outputs[0]
        reply = Reply(
            content=output.text,
            finish_reason=output.finish_reason,
            prompt_tokens=len(prompt),
            completion_tokens=len(output.token_ids),
        )
        return self._checked(reply, with_tools=bool(tools_to_call_from))


class _Listening(GenerationWatch):
    """Also ends a generation when the run exceeds its time limit."""

    def __init__(self, ctx: Context, watch: Watch) -> None:
        super().__init__(ctx, 1)
        self._run = watch

    def step(self, *, tokens: int = 0) -> None:
        self._run.check()
        super().step(tokens=tokens)


def plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """smolagents' messages as messages of the chat API; dictionaries stay as they are."""
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


def model_of(config: ModelConfig, served: Served) -> ModelConfig:
    """A configuration's model replaced by one that a task serves: nothing of what is meant for another is sent."""
    return msgspec.structs.replace(
        config,
        type="openai",
        name=served.model,
        base_url=served.base_url,
        api_key_env=None,
        headers={"Authorization": f"Bearer {served.api_key}"},
        serve=None,
    )


def schema_of(tool: Any) -> dict[str, Any]:
    """A tool's schema for the request; of an MCP server's tool the server's own schema."""
    schema = getattr(tool, "json_schema", None)
    if schema is None:
        return get_tool_json_schema(tool)
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": schema},
    }


def _tool_calls(calls: Sequence[Call]) -> list[ChatMessageToolCall]:
    return [
        ChatMessageToolCall(
            function=ChatMessageToolCallFunction(name=call.name, arguments=call.arguments), id=call.id, type="function"
        )
        for call in calls
    ]


def _problem(reply: Reply, text: str, *, has_calls: bool) -> str:
    """Why a reply is no answer to continue from; empty where it is one."""
    reason = reply.finish_reason.lower()
    if reply.refusal:
        return f"refusal: the model refused: {reply.refusal}"
    if reason not in FINISHED | CUT_OFF:
        return f"{reason}: the endpoint ended the answer for this reason, before it was complete"
    if has_calls:  # those that were cut off are reported to the model
        return ""
    if reason in CUT_OFF:
        return "length: the answer was cut off at the token limit; raise model.max_tokens, or make the task smaller"
    if reason in ("tool_calls", "tool_use"):
        return f"{reason}: the endpoint announced calls of tools, and the answer has none"
    if not text:
        return f"empty: the answer has {'nothing but thinking' if reply.content.strip() else 'neither text nor a call'}"
    return ""
