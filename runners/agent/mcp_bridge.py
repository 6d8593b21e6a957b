"""The tools of MCP servers over stdio, SSE and streamable HTTP, by the `mcp` package.

All sessions live on the task's event loop; the run checks for cancellation while it waits for their answers. Servers
that were started have ended when `close` returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from flowmesh.redaction import Redactor
from flowmesh.web.session import TRUST_VARIABLES
from runners.agent import tls
from runners.agent.config import McpServer
from runners.agent.event_loop import EventLoop
from runners.agent.secrets import from_env
from runners.agent.tools import ToolRefused, ToolSpec
from runners.agent.watch import Watch
from runners.api import BadRequest, MissingDependency, RunnerError

CLOSE_S = 10.0
STREAM_SILENCE_S = 300.0
"""Servers hold a response stream open without sending; calls have a time limit of their own."""
TYPES = frozenset({"string", "boolean", "integer", "number", "array", "object", "null"})
PASSED = ("LANG", "TMPDIR", "FLOWMESH_ATTEMPT", "VIRTUAL_ENV", *TRUST_VARIABLES)


class _Session(msgspec.Struct):
    """One connected server."""

    name: str
    wanted: McpServer
    client: Any = None
    tools: list[Any] = []
    ready: Any = None
    over: Any = None
    task: Any = None


class McpBridge:
    """The servers of one task. Use it as a context manager."""

    def __init__(self, servers: dict[str, McpServer], redact: Redactor, where: str, loop: EventLoop) -> None:
        """
        Args:
            where: how errors name the servers' section.
            loop: runs the sessions.

        Raises:
            MissingDependency: servers are configured, and `mcp` is not installed.
        """
        if servers and importlib.util.find_spec("mcp") is None:
            raise MissingDependency("mcp")
        self._servers = servers
        self._redact = redact
        self._where = where
        self._loop = loop
        self._sessions: dict[str, _Session] = {}

    def __enter__(self) -> McpBridge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, watch: Watch) -> None:
        """Start or connect all servers and list their tools.

        Raises:
            RunnerError: one does not start or answer, or lacks a tool that the configuration names.
            Cancelled, OutOfTime: from `watch`.
        """
        for name, wanted in self._servers.items():
            session = _Session(name, wanted)
            self._sessions[name] = session
            try:
                self._loop.wait(self._start(session), watch, wanted.timeout_s)
            except BadRequest:
                raise
            except Exception as error:  # noqa: BLE001 - transports raise errors of any kind
                raise RunnerError(f"{self._where}.{name}: {self._why(error, wanted)}") from None
            lacking = set(wanted.tools or ()) - {tool.name for tool in session.tools}
            if lacking:
                have = ", ".join(sorted(tool.name for tool in session.tools)) or "none"
                raise RunnerError(
                    f"{self._where}.{name}.tools: it has no {', '.join(sorted(lacking))} (it has: {have})"
                )

    def tools(self, servers: tuple[str, ...] | None, watch: Watch) -> list[ToolSpec]:
        """The tools of these servers (None: of all), under unique and valid names."""
        specs: list[ToolSpec] = []
        for session in self._sessions.values():
            if servers is not None and session.name not in servers:
                continue
            for tool in session.tools:
                if session.wanted.tools is not None and tool.name not in session.wanted.tools:
                    continue
                name = re.sub(r"\W", "_", tool.name)
                if name in {spec.name for spec in specs} or not name.isidentifier():
                    name = f"{session.name}_{name}"
                specs.append(self._spec(session, tool, name, watch))
        return specs

    def close(self) -> None:
        """End all sessions and the servers that were started, within CLOSE_S."""
        if self._sessions:
            with contextlib.suppress(Exception):  # a dying server may end its session with an error of any kind
                self._loop.submit(self._end()).result(CLOSE_S)

    async def _start(self, session: _Session) -> None:
        session.ready = asyncio.get_running_loop().create_future()
        session.over = asyncio.Event()
        session.task = asyncio.create_task(self._live(session))
        await asyncio.shield(session.ready)

    async def _live(self, session: _Session) -> None:
        """One session from start to end, in one task, as its library requires."""
        from mcp.client import Client

        try:
            async with (
                self._http(session.wanted) as http,
                Client(self._transport(session, http), read_timeout_seconds=session.wanted.timeout_s) as client,
            ):
                cursor, tools = None, []
                while True:
                    page = await client.list_tools(cursor=cursor)
                    tools += page.tools
                    cursor = page.next_cursor
                    if not cursor:
                        break
                session.client, session.tools = client, tools
                session.ready.set_result(None)
                await session.over.wait()
        except BaseException as error:  # noqa: BLE001 - raised by who waits for the session
            if session.ready.done():
                return
            session.ready.set_exception(error if isinstance(error, Exception) else RunnerError("ended"))
            session.ready.exception()  # marks it as retrieved, as nobody may wait for it any more

    @contextlib.asynccontextmanager
    async def _http(self, wanted: McpServer) -> AsyncIterator[Any]:
        """The HTTP client for streamable HTTP; the library does not close a client that it is given."""
        if wanted.transport != "streamable_http":
            yield None
            return
        import httpx2

        timeout = httpx2.Timeout(wanted.timeout_s, read=max(wanted.timeout_s, STREAM_SILENCE_S))
        async with httpx2.AsyncClient(headers=dict(wanted.headers), timeout=timeout, verify=tls.context()) as client:
            yield client

    def _transport(self, session: _Session, http: Any) -> Any:
        wanted, where = session.wanted, f"{self._where}.{session.name}"
        for value in wanted.headers.values():  # most are credentials
            self._redact.learn(value)
        self._redact.learn_named(wanted.env)
        if wanted.transport == "stdio":
            from mcp.client import stdio

            env = {name: os.environ[name] for name in PASSED if name in os.environ}
            for name in wanted.env_from:
                env[name] = from_env(name, f"{where}.env_from")
                self._redact.learn(env[name])
            command = sys.executable if wanted.command == "{python}" else wanted.command or ""
            return stdio.stdio_client(
                stdio.StdioServerParameters(command=command, args=list(wanted.args), env={**env, **wanted.env}),
                errlog=sys.__stderr__ or sys.stderr,
            )
        if wanted.transport == "sse":
            from mcp.client.sse import sse_client

            return sse_client(
                wanted.url or "", headers=dict(wanted.headers) or None, timeout=wanted.timeout_s,
                httpx_client_factory=_client,
            )  # fmt: skip
        from mcp.client import streamable_http

        return streamable_http.streamable_http_client(wanted.url or "", http_client=http)

    async def _end(self) -> None:
        tasks = [session.task for session in self._sessions.values() if session.task is not None]
        for session in self._sessions.values():
            if session.over is not None:
                session.over.set()
            if session.client is None and session.task is not None:
                session.task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S - 1)

    def _spec(self, session: _Session, tool: Any, name: str, watch: Watch) -> ToolSpec:
        schema = dict(tool.input_schema or {"type": "object", "properties": {}})

        def call(**arguments: Any) -> str:
            given = {key: value for key, value in arguments.items() if value is not None}
            try:
                called = session.client.call_tool(tool.name, given)
                result = self._loop.wait(called, watch, session.wanted.timeout_s)
            except Exception as error:  # noqa: BLE001 - reported to the model; the run continues
                raise ToolRefused(f"the MCP server {session.name}: {self._why(error, session.wanted)}") from None
            text = _text(result)
            if result.is_error:
                raise ToolRefused(text or "the tool failed and did not say why")
            return text

        return ToolSpec(
            name=name,
            description=tool.description or tool.name,
            inputs=_inputs(schema),
            call=call,
            schema=schema,
        )

    def _why(self, error: BaseException, wanted: McpServer) -> str:
        """One line about an error, redacted."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, RunnerError | TimeoutError):
            return self._redact(str(error))
        if isinstance(error, FileNotFoundError | PermissionError):
            return f"{wanted.command!r} cannot be started: {error.strerror}"
        return self._redact(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _client(headers: Any = None, timeout: Any = None, auth: Any = None) -> Any:
    """What the library makes, with our certificate authorities."""
    import httpx2

    return httpx2.AsyncClient(headers=headers, timeout=timeout, auth=auth, verify=tls.context())


def _text(result: Any) -> str:
    """A tool's result as text; content that is not text as its kind."""
    parts = []
    for block in result.content or ():
        if (text := getattr(block, "text", None)) is not None:
            parts.append(text)
        elif getattr(block, "type", "") == "resource" and getattr(block.resource, "text", None) is not None:
            parts.append(block.resource.text)
        elif getattr(block, "type", "") == "resource_link":
            parts.append(str(block.uri))
        else:
            parts.append(f"[{getattr(block, 'type', 'content')}]")
    if not parts and (structured := getattr(result, "structured_content", None)) is not None:
        parts.append(json.dumps(structured, ensure_ascii=False, default=str))
    return "\n".join(parts)


def _inputs(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A JSON schema's arguments as smolagents checks them; the server checks the rest."""
    required = set(schema.get("required") or ())
    inputs: dict[str, dict[str, Any]] = {}
    for name, each in (schema.get("properties") or {}).items():
        kind = each.get("type") if isinstance(each, dict) else None
        known = kind in TYPES if isinstance(kind, str) else False
        inputs[name] = {
            "type": kind if known else "any",
            "description": str(each.get("description") or each.get("title") or name)
            if isinstance(each, dict)
            else name,
            **({} if name in required else {"nullable": True}),
        }
    return inputs
