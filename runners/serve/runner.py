"""Serves a model over HTTP until its time is over, nobody uses it, or the task is cancelled."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import secrets
import socket
import threading
import time
from concurrent.futures import Future
from typing import Any

from flowmesh.web.own_address import address_towards
from runners.api import BadRequest, Cancelled, Context, MissingDependency, Preparation, Runner, RunnerError
from runners.inference.task_model import parts_ahead
from runners.serve.errors import ServerLost
from runners.serve.gate import Gate
from runners.serve.keeper import Keeper
from runners.serve.process import Place, ServingContext
from runners.serve.result import result_of
from runners.serve.served import Served, load
from runners.serve.task import Serve, ServeTask, address_of, check_allowed, read_serve

TICK_S = 0.2
ANNOUNCE_S = 1.0
"""Between two frames that tell the node where the model is served, and its numbers."""
FIRST_ANSWER_S = 600.0
"""The first completion may compile kernels."""
SILENT_S = 600.0
"""Requests that have no part of an answer for so long are no sign of health any more."""
HEALTH_TIMEOUT_S = 60.0
FAILURES = 3
"""Health checks in a row that end the serving process."""
STOP_S = 3.0
"""How long requests that are being answered may go on after the end."""
BACKLOG = 128


class ServeRunner(Runner):
    """Task type `serve`, in the task's own process: it keeps the address, and another process serves there."""

    def ahead(self, ctx: Context) -> list[Preparation]:
        return parts_ahead(ctx, read_serve(ctx, ctx.spec).model)

    def run(self, ctx: Context) -> dict[str, Any]:
        ctx.phase("prepare")
        task = read_serve(ctx, ctx.spec)
        check_allowed(ctx, task.serve)
        for library in ("fastapi", "uvicorn"):
            if importlib.util.find_spec(library) is None:
                raise MissingDependency(library)
        with contextlib.closing(_bound(task.serve)) as listener:  # before the model is loaded, which takes its time
            return Keeper(ctx, task, listener).run()


class ServingRunner(Runner):
    """The serving process; see `process.fork`."""

    def run(self, ctx: Context) -> dict[str, Any]:
        assert isinstance(ctx, ServingContext), "only its parent starts it"
        place = ctx.place
        task = read_serve(ctx, ctx.spec)
        ctx.phase("load")
        served = load(ctx, task)
        own_key = secrets.token_urlsafe(32)
        gate = Gate(
            served.app, place.key, served.models, asks_usage=served.asks_usage, fields=served.fields,
            own_key=own_key, numbers=place.numbers, times=place.times,
        )  # fmt: skip
        ctx.take_listener()
        server = Server(gate, place.listener, served.models[0].name, own_key)
        ctx.phase("check")
        try:
            return _serve(ctx, task, server, served, place)
        finally:
            server.stop()
            served.close()


def _bound(serve: Serve) -> socket.socket:
    host = address_of(serve)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, serve.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise BadRequest(
            f"spec.serve.port: cannot listen on {host} port {serve.port}: {error.strerror}; 0 takes a free one"
        ) from None


class Server:
    """The HTTP server in a thread of its own, and the requests that check it."""

    def __init__(self, gate: Gate, listener: socket.socket, name: str, own_key: str) -> None:
        import uvicorn

        self.gate = gate
        self._listener = listener
        self._name = name
        self._own_key = own_key
        host, port = listener.getsockname()[:2]
        self._at = (_reachable(host, local=True), port)
        told = _reachable(host, local=False)
        self.base_url = f"http://{f'[{told}]' if ':' in told else told}:{port}/v1"
        config = uvicorn.Config(
            gate, log_config=None, log_level="error", access_log=False, ws="none", server_header=False,
            timeout_graceful_shutdown=int(STOP_S), lifespan="on",
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True, name="http")
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def check(self, timeout_s: float) -> Future[str]:
        """Ask for a completion of one token through the server's own port; the future has what was wrong, or ""."""
        future: Future[str] = Future()

        def ask() -> None:
            try:
                future.set_result(self._ask(timeout_s))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
                future.set_result(f"{type(error).__name__}: {error}")

        threading.Thread(target=ask, daemon=True, name="health").start()
        return future

    def _ask(self, timeout_s: float) -> str:
        connection = http.client.HTTPConnection(*self._at, timeout=timeout_s)
        with contextlib.closing(connection):
            body = json.dumps({"model": self._name, "prompt": "1", "max_tokens": 1, "temperature": 0})
            headers = {"Authorization": f"Bearer {self._own_key}", "Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", body, headers)
            answer = connection.getresponse()
            content = answer.read(65536)
        if answer.status != 200:
            return f"status {answer.status}: {content[:300].decode(errors='replace')}"
        return "" if b'"choices"' in content else f"an answer without choices: {content[:300].decode(errors='replace')}"

    def stop(self) -> None:
        """End the server; answers that are not complete after STOP_S are cut off."""
        self._server.should_exit = True
        self._thread.join(STOP_S + 1)
        self._server.force_exit = True
        self._thread.join(1)


def _serve(ctx: Context, task: ServeTask, server: Server, served: Served, place: Place) -> dict[str, Any]:
    """Check, announce and watch the server; returns the result once it is to end.

    Raises:
        RunnerError: it does not answer, or not any more.
        Cancelled: the node stopped the task for another reason than a cancel.
    """
    gate, serve = server.gate, task.serve
    name = served.models[0].name
    first = server.check(FIRST_ANSWER_S)
    while not first.done():
        _check_alive(server, served)
        ctx.sleep(TICK_S)
    if wrong := first.result():
        raise RunnerError(f"the served model gave no answer to the first request: {wrong}")
    ctx.phase("serve")
    ctx.log.info("serving model=%s base_url=%s", name, server.base_url)
    since = place.since or time.monotonic()
    gate.start_idle()

    def announce() -> None:
        numbers = {**served.engine_numbers(), **gate.numbers()}
        ctx.serve(server.base_url, name, place.key, numbers=numbers, times=gate.times())

    try:
        reason = watch(ctx, serve, server, served, announce, since=since)
    except Cancelled:
        request = ctx.cancelled
        if request is None or request.stop != "cancelled":
            raise
        reason = "cancelled"
    ctx.phase("stop")
    seconds = time.monotonic() - since
    server.stop()
    ctx.log.info("served model=%s reason=%s requests=%d failed=%d", name, reason, gate.requests, gate.failed)
    return result_of(task, served.source, server.base_url, reason, gate.numbers(), seconds)


def _check_alive(server: Server, served: Served) -> None:
    if (failure := served.failure()) is not None:
        raise failure
    if not server.alive:
        raise ServerLost("the HTTP server ended by itself; see the task's log")


def watch(ctx: Context, serve: Serve, server: Server, served: Served, announce: Any, *, since: float) -> str:
    """Wait for the end; returns the reason, `ttl` or `idle`."""
    gate = server.gate
    announced = float("-inf")
    checked, failures, check = time.monotonic(), 0, None
    while True:
        now = time.monotonic()
        _check_alive(server, served)
        if now - announced >= ANNOUNCE_S:
            announced = now
            announce()
        ctx.progress(gate.requests, None, "requests", running=gate.running, failed=gate.failed, tokens=gate.tokens)
        if serve.ttl_s is not None and now - since >= serve.ttl_s:
            return "ttl"
        if serve.idle_s is not None and gate.idle_s() >= serve.idle_s:
            return "idle"
        if check is not None and check.done():
            wrong, check, checked = check.result(), None, now
            failures = failures + 1 if wrong else 0
            if wrong:
                ctx.log.error("health check failed %d/%d: %s", failures, FAILURES, wrong)
            if failures >= FAILURES:
                raise ServerLost(f"{FAILURES} health checks in a row failed; the last one: {wrong}")
        elif check is None and gate.running and gate.silent_s() < SILENT_S:
            checked = now  # a request that is answered is a check; one of ours would wait behind it
        elif check is None and now - checked >= serve.health_interval_s:
            check = server.check(HEALTH_TIMEOUT_S)
        ctx.sleep(TICK_S)


def _reachable(host: str, *, local: bool) -> str:
    """An address to reach a listener at, where it listens on all of them."""
    if host not in ("0.0.0.0", "::"):
        return host
    loopback, other = ("127.0.0.1", "192.0.2.1") if host == "0.0.0.0" else ("::1", "2001:db8::1")
    try:
        return loopback if local else address_towards(other)
    except OSError:
        return loopback
