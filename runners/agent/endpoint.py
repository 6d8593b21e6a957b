"""Chat completions of any OpenAI-compatible endpoint, over the `openai` package's client.

A request runs on the task's event loop: a cancel closes its connection at once, also while the endpoint is silent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from flowmesh.redaction import Redactor
from runners.agent import tls
from runners.agent.completions import Reply, Reported, Unusable, error_text, read_reply
from runners.agent.config import Model
from runners.agent.event_loop import EventLoop
from runners.agent.secrets import from_env
from runners.agent.watch import Watch
from runners.agent.written import encodable
from runners.api import BadRequest, RunnerError

FIRST_PAUSE_S = 0.5
CONNECT_TIMEOUT_S = 10.0
OWN_HEADERS = ("Authorization", "OpenAI-Organization", "OpenAI-Project")
"""Sent only where the configuration has them: `openai` would take them from variables meant for other endpoints."""


class EndpointError(RunnerError):
    """The endpoint refused, broke off, or cannot be reached. Names it and its message, never the key."""


class Endpoint:
    """One endpoint and the model on it. One request at a time."""

    def __init__(
        self, wanted: Model, base_url: str, redact: Redactor, where: str, loop: EventLoop, *, direct: bool = False
    ) -> None:
        """
        Args:
            where: the model's section of the configuration, as errors name it.
            direct: never over a proxy: a server of this machine, or another task.

        Raises:
            BadRequest: no address, or the key's variable is not set.
        """
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadRequest(f"{where}.base_url: an http or https address is needed, such as http://HOST:8000/v1")
        self._wanted = wanted
        self._redact = redact
        self._where = where
        self._loop = loop
        self.shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._headers = _headers(wanted, redact, where)
        self._client = openai.AsyncOpenAI(
            api_key="unused",  # required, but the headers below carry the key, if there is one
            base_url=self.shown,
            timeout=httpx2.Timeout(wanted.timeout_s, connect=CONNECT_TIMEOUT_S),
            http_client=httpx2.AsyncClient(trust_env=not direct, verify=tls.context()),
        )
        self.name = wanted.name or ""

    def find_model(self, watch: Watch) -> str:
        """The model's name: the configured one, else the first that the endpoint lists.

        Raises:
            EndpointError: it lists none, or does not answer.
        """
        if not self.name:
            listed = self._loop.wait(self._list_models(), watch)
            entries = listed.get("data") if isinstance(listed, dict) else None
            first = entries[0] if isinstance(entries, list) and entries else None
            if not isinstance(first, dict) or not isinstance(first.get("id"), str):
                failed = isinstance(listed, dict) and "error" in listed
                detail = f" ({self._redact(error_text(listed))})" if failed else ""
                raise self._error(f"lists no model{detail}; name one ({self._where}.name)")
            self.name = first["id"]
        return self.name

    def complete(self, watch: Watch, messages: list[dict[str, Any]], **fields: Any) -> Reply:
        """One chat completion.

        Args:
            fields: of the request, besides what the configuration has; None leaves one out.

        Raises:
            EndpointError: no usable answer, after the configured retries.
            Cancelled, OutOfTime: from `watch`.
        """
        wanted = self._wanted
        body: dict[str, Any] = {"model": self.find_model(watch), "messages": messages}
        for name in ("temperature", "top_p", "max_tokens", "seed"):
            if (value := getattr(wanted, name)) is not None:
                body[name] = value
        body |= {name: value for name, value in fields.items() if value is not None}
        if wanted.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        body = json.loads(encodable(json.dumps(body | wanted.extra, ensure_ascii=False)))
        tools = {tool["function"]["name"] for tool in fields.get("tools") or ()}
        return self._loop.wait(self._complete(body, tools), watch)

    def close(self) -> None:
        """Close the connections."""
        self._loop.submit(self._client.close())

    async def _list_models(self) -> Any:
        try:
            client = self._client.with_options(max_retries=self._wanted.retries)
            return await client.get("/models", cast_to=object, options={"headers": self._headers})
        except openai.OpenAIError as error:
            raise self._failed(error) from None
        except (ValueError, httpx2.HTTPError):
            raise self._error("gave a list of models that cannot be read") from None

    async def _complete(self, body: dict[str, Any], tools: Collection[str]) -> Reply:
        """`openai` retries refused requests; this retries responses that break off. Together `retries` times."""
        left, pause_s = self._wanted.retries, FIRST_PAUSE_S
        while True:
            create = self._client.with_options(max_retries=left).chat.completions.with_streaming_response.create
            try:
                async with create(
                    model=body["model"], messages=body["messages"], extra_body=body, extra_headers=self._headers
                ) as answer:
                    left -= answer.retries_taken
                    return await read_reply(answer.iter_bytes(), tools)
            except openai.OpenAIError as error:
                raise self._failed(error) from None
            except Reported as error:
                if left == 0 or not error.may_pass:
                    raise self._error(f"reported an error: {self._redact(str(error))}") from None
            except (Unusable, httpx2.HTTPError) as error:
                if left == 0:
                    raise self._error(self._redact(self._problem(error))) from None
            left -= 1
            await asyncio.sleep(pause_s)
            pause_s *= 2

    def _problem(self, error: Exception) -> str:
        match error:
            case Unusable():
                return str(error)
            case httpx2.TimeoutException():
                return f"was silent for {self._wanted.timeout_s:g} s"
        return "broke off in the middle of its answer"

    def _failed(self, error: openai.OpenAIError) -> EndpointError:
        """What `openai` raised after its retries, as one line."""
        match error:
            case openai.APIStatusError(status_code=status, response=response):
                detail = self._redact(error_text(error.body)) if error.body else ""
                answered = f"answered {status} {response.reason_phrase}" + (f": {detail}" if detail else "")
                if status == 404:
                    answered += f" (check {self._where}.name, {self.name!r}, and {self._where}.base_url)"
                if after := response.headers.get("Retry-After"):
                    answered += f" (Retry-After: {self._redact(after[:50])})"
                return self._error(answered)
            case openai.APITimeoutError() if not isinstance(error.__cause__, httpx2.ConnectTimeout):
                return self._error(f"was silent for {self._wanted.timeout_s:g} s")
            case openai.APIConnectionError() if (why := tls.refusal(error)) is not None:
                return self._error(f"has a certificate that is not trusted ({why}); see SSL_CERT_FILE")
            case openai.APIConnectionError():
                return self._error("cannot be reached, or broke the connection off")
        return self._error(f"could not be asked: {type(error).__name__}")

    def _error(self, what: str) -> EndpointError:
        return EndpointError(f"the model endpoint {self.shown} {what}")


def _headers(wanted: Model, redact: Redactor, where: str) -> dict[str, Any]:
    headers: dict[str, Any] = {name: openai.Omit() for name in OWN_HEADERS}
    known = {name.lower(): name for name in OWN_HEADERS}
    for name, value in wanted.headers.items():
        redact.learn(value)
        headers[known.get(name.lower(), name)] = value
    if wanted.api_key_env is not None:
        key = from_env(wanted.api_key_env, f"{where}.api_key_env")
        redact.learn(key)
        headers["Authorization"] = f"Bearer {key}"
    return headers
