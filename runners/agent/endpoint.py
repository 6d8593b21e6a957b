"""Chat completions of any OpenAI-compatible endpoint: whole or streamed, with retries, and never deaf to a cancel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec

from flowmesh.redaction import Redactor
from runners.agent.config import Model
from runners.agent.secrets import from_env
from runners.agent.watch import Watch
from runners.api import BadRequest, RunnerError

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
MAX_ANSWER_BYTES = 64 * 2**20
CONNECT_TIMEOUT_S = 10.0


class EndpointError(RunnerError):
    """The endpoint refused, broke off, or is not there. Says which one and what it said, never the key."""


class Call(msgspec.Struct, frozen=True):
    """A tool that the model wants called."""

    id: str
    name: str
    arguments: str


class Reply(msgspec.Struct, frozen=True):
    """One answer of the model."""

    content: str
    calls: tuple[Call, ...]
    prompt_tokens: int
    completion_tokens: int


class _Try(Exception):
    """This attempt failed in a way that the next one may not."""

    def __init__(self, reason: str, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class Endpoint:
    """One endpoint and the model on it. Requests go one after the other."""

    def __init__(self, wanted: Model, base_url: str, redact: Redactor, where: str) -> None:
        """
        Raises:
            BadRequest: no address, or the key's variable is not set.
        """
        import requests

        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadRequest(f"{where}.base_url: an http or https address is needed, such as http://HOST:8000/v1")
        self._wanted = wanted
        self._base = base_url.rstrip("/")
        port = f":{parts.port}" if parts.port else ""
        self.shown = f"{parts.scheme}://{parts.hostname}{port}{parts.path.rstrip('/')}"
        self._redact = redact
        self._session = requests.Session()
        self._session.auth = lambda request: request  # else a .netrc of the node's would be sent
        for name, value in wanted.headers.items():
            redact.learn(value)
            self._session.headers[name] = value
        if wanted.api_key_env is not None:
            key = from_env(wanted.api_key_env, f"{where}.api_key_env")
            redact.learn(key)
            self._session.headers["Authorization"] = f"Bearer {key}"
        self.name = wanted.name or ""

    def find_model(self, watch: Watch) -> str:
        """The model's name: the configured one, else the first that the endpoint lists.

        Raises:
            EndpointError: it lists none, or does not answer.
        """
        if not self.name:
            listed = self._asking(watch, "GET", "/models", None, _whole)
            entries = listed.get("data") if isinstance(listed, dict) else None
            first = entries[0] if isinstance(entries, list) and entries else None
            if not isinstance(first, dict) or not isinstance(first.get("id"), str):
                raise EndpointError(f"the model endpoint {self.shown} lists no model; name one (model.name)")
            self.name = first["id"]
        return self.name

    def complete(self, watch: Watch, messages: list[dict[str, Any]], **fields: Any) -> Reply:
        """One chat completion.

        Args:
            fields: of the request, besides what the configuration has; None leaves one out.

        Raises:
            EndpointError: no usable answer, after the configured retries.
            Cancelled, OutOfTime: as `watch` says.
        """
        wanted = self._wanted
        body: dict[str, Any] = {"model": self.find_model(watch), "messages": messages}
        for name in ("temperature", "top_p", "max_tokens", "seed"):
            if (value := getattr(wanted, name)) is not None:
                body[name] = value
        body |= {name: value for name, value in fields.items() if value is not None}
        if wanted.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= wanted.extra
        return self._asking(watch, "POST", "/chat/completions", body, _streamed if wanted.stream else _reply_of_whole)

    def _asking(self, watch: Watch, method: str, path: str, body: Any, read: Any) -> Any:
        pause_s = FIRST_PAUSE_S
        for attempt in range(self._wanted.retries + 1):
            try:
                return watch.wait(lambda: self._once(method, path, body, read))
            except _Try as error:
                if attempt == self._wanted.retries:
                    raise EndpointError(f"the model endpoint {self.shown} {error}") from None
                watch.sleep(min(error.pause_s or pause_s, LONGEST_PAUSE_S))
                pause_s *= 2
        raise AssertionError("the last attempt returns or raises")

    def _once(self, method: str, path: str, body: Any, read: Any) -> Any:
        import requests

        try:
            with self._session.request(
                method,
                self._base + path,
                json=body,
                stream=True,
                allow_redirects=False,
                timeout=(CONNECT_TIMEOUT_S, self._wanted.timeout_s),
            ) as answer:
                if answer.status_code != 200:
                    self._refuse(answer)
                return read(answer)
        except requests.exceptions.ConnectTimeout:
            raise _Try("cannot be reached") from None
        except requests.exceptions.Timeout:
            raise _Try(f"was silent for {self._wanted.timeout_s:g} s") from None
        except requests.exceptions.ConnectionError:
            raise _Try("cannot be reached, or broke the connection off") from None
        except requests.exceptions.ChunkedEncodingError:
            raise _Try("broke off in the middle of its answer") from None
        except requests.RequestException as error:
            raise EndpointError(f"the model endpoint {self.shown}: {type(error).__name__}") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reason = self._redact(" ".join(str(error).split()))[:200]
            raise _Try(f"gave an answer that is none of a chat completion ({type(error).__name__}: {reason})") from None

    def _refuse(self, answer: Any) -> None:
        said = self._redact(_message(next(answer.iter_content(2000), b"")))
        reason = f"answered {answer.status_code} {answer.reason}" + (f": {said}" if said else "")
        if answer.status_code in RETRIED:
            wait = answer.headers.get("Retry-After", "")
            raise _Try(reason, float(wait) if wait.replace(".", "", 1).isdigit() else None)
        raise EndpointError(f"the model endpoint {self.shown} {reason}")


def _whole(answer: Any) -> Any:
    data = bytearray()
    for chunk in answer.iter_content(1 << 16):
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise ValueError(f"more than {MAX_ANSWER_BYTES} bytes")
    return json.loads(data)


def _reply_of_whole(answer: Any) -> Reply:
    data = _whole(answer)
    message = data["choices"][0]["message"]
    calls = tuple(
        Call(call.get("id") or f"call_{index}", call["function"]["name"], _text(call["function"].get("arguments")))
        for index, call in enumerate(message.get("tool_calls") or ())
    )
    return _reply(message.get("content"), calls, data.get("usage"))


def _streamed(answer: Any) -> Reply:
    """A reply put together from server-sent events."""
    content: list[str] = []
    calls: dict[int, dict[str, str]] = {}
    usage: Any = None
    ended = False
    for data in _events(answer):
        if data == "[DONE]":
            ended = True
            break
        event = json.loads(data)
        if isinstance(event.get("error"), dict):
            raise ValueError(str(event["error"].get("message")))
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            content.append(delta.get("content") or "")
            ended = ended or choice.get("finish_reason") is not None
            for part in delta.get("tool_calls") or ():
                call = calls.setdefault(part.get("index", 0), {"id": "", "name": "", "arguments": ""})
                call["id"] = part.get("id") or call["id"]
                function = part.get("function") or {}
                call["name"] += function.get("name") or ""
                call["arguments"] += function.get("arguments") or ""
    if not ended:
        raise _Try("broke off in the middle of its answer")
    made = tuple(
        Call(call["id"] or f"call_{index}", call["name"], call["arguments"]) for index, call in sorted(calls.items())
    )
    return _reply("".join(content), made, usage)


def _events(answer: Any) -> Iterator[str]:
    for line in answer.iter_lines():
        if line.startswith(b"data:"):
            yield line[5:].strip().decode()


def _reply(content: Any, calls: tuple[Call, ...], usage: Any) -> Reply:
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    if content is not None and not isinstance(content, str):
        raise TypeError("the message's content is no text")
    used = usage if isinstance(usage, dict) else {}
    return Reply(content or "", calls, int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0))


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments if arguments is not None else {})


def _message(data: bytes) -> str:
    """What an error's body says, in one line."""
    text = data.decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found.get("message", found)) if isinstance(found, dict) else found
        text = found.get("message", text) if isinstance(found, dict) else str(found)
    except ValueError:
        pass
    return " ".join(str(text).split())[:300]
