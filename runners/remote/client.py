"""Requests to one endpoint by the `openai` package's client: attempts, pauses, and what an error means."""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from typing import Any

import httpx2
import openai

from flowmesh.redaction import Redactor
from runners.agent import tls
from runners.agent.completions import error_text
from runners.api import RunnerError
from runners.remote.answers import Answer, BadAnswer, estimated_tokens, read_answer, read_json
from runners.remote.pace import Pace
from runners.remote.task import PATHS, Api

DEFAULT_RETRIES, DEFAULT_TIMEOUT_S = 5, 120.0
CONNECT_TIMEOUT_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
LONGEST_RETRY_AFTER_S = 600.0
"""A longer one is an error of the item."""
RETRIED = frozenset((408, 409, 425, 429))
"""Statuses below 500 that another attempt may not get."""
OF_ALL = frozenset((401, 402, 403, 404))
"""Statuses that every other request would get, too: the key, the account, the address or the model."""
OWN_HEADERS = ("Authorization", "OpenAI-Organization", "OpenAI-Project")
"""Sent only where the document has them: `openai` would take them from variables meant for other endpoints."""


class ItemError(Exception):
    """A request that got no answer. The others are not concerned.

    Args:
        kind: `refused` (the request is wrong), or `unavailable` after all attempts.
        status: of HTTP, if there was an answer.
    """

    def __init__(self, kind: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


class EndpointError(RunnerError):
    """No request can be served. Names the endpoint and its message, never the key."""


class Client:
    """One endpoint. Its methods run on one event loop."""

    def __init__(self, api: Api, base_url: str, key: str | None, redact: Redactor) -> None:
        self._api = api
        self._redact = redact
        self._retries = DEFAULT_RETRIES if api.retries is None else api.retries
        self._timeout_s = api.timeout_s or DEFAULT_TIMEOUT_S
        self.pace = Pace(api.requests_per_minute, api.tokens_per_minute)
        self.attempts = 0
        headers: dict[str, Any] = {name: openai.Omit() for name in OWN_HEADERS}
        known = {name.lower(): name for name in OWN_HEADERS}
        for name, value in (api.headers or {}).items():
            redact.learn(value)
            headers[known.get(name.lower(), name)] = value
        if key is not None:
            redact.learn(key)
            headers["Authorization"] = f"Bearer {key}"
        self._headers = headers
        self._client = openai.AsyncOpenAI(
            api_key="unused",  # required, but the headers carry the key, if there is one
            base_url=base_url,
            max_retries=0,  # attempts are made here, where a pause holds for all requests
            timeout=httpx2.Timeout(self._timeout_s, connect=min(CONNECT_TIMEOUT_S, self._timeout_s)),
            http_client=httpx2.AsyncClient(
                trust_env=api.base_url == base_url, verify=tls.context(),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=api.concurrency),
            ),
        )  # fmt: skip

    async def find_model(self) -> str:
        """The first model that the endpoint lists.

        Raises:
            EndpointError: it lists none.
        """
        try:
            listed = await self._attempts(lambda: self._get("/models"), 0, lambda got: read_json(got, "data"))
        except ItemError as error:
            raise EndpointError(f"{error}; name a model (spec.api.model)") from None
        entries = listed.get("data") if isinstance(listed, dict) else None
        first = entries[0] if isinstance(entries, list) and entries else None
        if not isinstance(first, dict) or not isinstance(first.get("id"), str):
            raise self._error("lists no model; name one (spec.api.model)")
        return str(first["id"])

    async def ask(self, body: dict[str, Any]) -> Answer:
        """The answer to one request.

        Raises:
            ItemError: there is none for this request.
            EndpointError: nor would there be one for any other.
        """
        kind, estimated = self._api.kind, estimated_tokens(body)
        answer: Answer = await self._attempts(
            lambda: self._post(PATHS[kind], body), estimated, lambda got: read_answer(kind, got, body["model"])
        )
        if answer.usage is not None:
            self.pace.correct(estimated, answer.usage.prompt_tokens + answer.usage.completion_tokens)
        return answer

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _attempts(self, send: Any, estimated: int, read: Any) -> Any:
        for number in range(self._retries + 1):
            await self._wait_for_turn(estimated)
            self.attempts += 1
            pause_s = min(FIRST_PAUSE_S * 2**number, LONGEST_PAUSE_S) * random.uniform(0.5, 1)
            try:
                return read(await send())
            except openai.APIStatusError as error:
                problem, status = self._status(error), error.status_code
                if status not in RETRIED and status < 500:
                    raise ItemError("refused", problem, status) from None
                after = retry_after(error.response.headers)
                if after is not None and after > LONGEST_RETRY_AFTER_S:
                    raise ItemError("unavailable", f"{problem}: it asks to wait for {after:.0f} s", status) from None
                if after is not None:
                    self.pause(after)
                    pause_s = 0.0
            except openai.APITimeoutError:
                problem, status = f"{self._name} was silent for {self._timeout_s:g} s", None
            except openai.APIConnectionError as error:
                if (why := tls.refusal(error)) is not None:
                    raise self._error(f"has a certificate that is not trusted ({why}); see SSL_CERT_FILE") from None
                problem, status = f"{self._name} cannot be reached, or broke the connection off", None
            except BadAnswer as error:
                problem, status = f"{self._name} {self._redact(str(error))}", 200
            except (openai.OpenAIError, ValueError, httpx2.HTTPError):
                problem, status = f"{self._name} gave an answer that cannot be read, or broke it off", 200
            if number < self._retries:
                await asyncio.sleep(pause_s)
        raise ItemError("unavailable", f"{problem} (after {self._retries + 1} attempts)", status)

    async def _wait_for_turn(self, estimated: int) -> None:
        await asyncio.sleep(self.pace.take(estimated))
        while (left := self.pace.paused_s) > 0:  # another request was told to wait meanwhile
            await asyncio.sleep(left)

    def pause(self, seconds: float) -> None:
        self.pace.pause(seconds)

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        return await self._client.post(path, cast_to=object, body=body, options={"headers": self._headers})

    async def _get(self, path: str) -> Any:
        return await self._client.get(path, cast_to=object, options={"headers": self._headers})

    def _status(self, error: openai.APIStatusError) -> str:
        """What a status means, as one line.

        Raises:
            EndpointError: it is one that all requests would get.
        """
        detail = self._redact(error_text(error.body)) if error.body else ""
        text = f"answered {error.status_code} {error.response.reason_phrase}" + (f": {detail}" if detail else "")
        code = error.body.get("code") if isinstance(error.body, dict) else None
        if error.status_code in OF_ALL or code == "insufficient_quota":
            raise self._error(text) from None
        return f"{self._name} {text}"

    @property
    def _name(self) -> str:
        return f"the endpoint {self._api.shown}"

    def _error(self, what: str) -> EndpointError:
        return EndpointError(f"{self._name} {what}")


def retry_after(headers: Any) -> float | None:
    """Seconds that an answer asks to wait; None: it does not say."""
    if (given := headers.get("retry-after-ms")) is not None and _number(given) is not None:
        return max((_number(given) or 0.0) / 1000, 0.0)
    given = headers.get("retry-after")
    if given is None:
        return None
    if (seconds := _number(given)) is not None:
        return max(seconds, 0.0)
    try:
        return max(email.utils.parsedate_to_datetime(given).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if found == found else None  # noqa: PLR0124 - not NaN
