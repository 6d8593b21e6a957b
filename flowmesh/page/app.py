"""The page's routes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import jinja2
from markupsafe import Markup, escape
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from flowmesh.cli import render
from flowmesh.cli.history import dollars, energy, number
from flowmesh.errors import ConfigError, FlowMeshError
from flowmesh.messages import wire
from flowmesh.messages.page import Note
from flowmesh.messages.text import escaped
from flowmesh.metrics.families import CONTENT_TYPE
from flowmesh.page import task_view
from flowmesh.page.downloads import Downloads
from flowmesh.page.guard import HEALTH, LOGIN, MOST_BODY, Guard
from flowmesh.page.log_view import LogView
from flowmesh.page.sources import Sources
from flowmesh.page.tokens import COOKIE, LASTS_S, Tokens
from flowmesh.tasks.history import Entry, Reader
from flowmesh.tasks.verdicts import Kind

HERE = Path(__file__).parent
SHOWN, MOST_SHOWN = 50, 500
"""Tasks on one page."""
MOST_SCANNED = 20_000
"""Tasks that a filter looks at."""
FILTERS = ("type", "verdict", "owner", "task")


def make_app(note: Note, redis_url: str | None, tokens: Tokens) -> ASGIApp:
    """The whole page behind its guard."""
    sources = Sources(note, redis_url)
    pages = Pages(sources, tokens)
    downloads = Downloads(sources)
    routes = [
        Route("/", pages.node),
        Route("/fleet", pages.fleet),
        Route("/tasks", pages.tasks),
        Route("/tasks/{task_id}", pages.task),
        Route("/tasks/{task_id}/log", pages.log),
        Route("/api/v1/results/{task_id}", downloads.result),
        Route("/api/v1/results/{task_id}/files/{name:path}", downloads.file),
        Route(HEALTH, pages.health),
        Route("/metrics", pages.metrics),
        Route(LOGIN, pages.login, methods=["GET", "POST"]),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]
    app = Starlette(routes=routes, exception_handlers={FlowMeshError: pages.failed, 404: pages.missing})
    return Guard(app, tokens=tokens, listens=note.host, hosts=note.hosts)


def _prose(text: str) -> Markup:
    """Our own advice, with what stands between backticks as code."""
    parts = [escape(escaped(part)) for part in text.split("`")]
    code = (f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
    return Markup("".join(code))


class Pages:
    def __init__(self, sources: Sources, tokens: Tokens) -> None:
        self._sources = sources
        self._tokens = tokens
        self._logs = LogView(sources.state_dir)
        loader = jinja2.FileSystemLoader(HERE / "templates")
        self._templates = jinja2.Environment(
            loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._templates.filters |= {
            "seconds": lambda value: "" if value is None else render.seconds(float(value)),
            "gib": lambda value: "" if value is None else render.gib(value),
            "joules": energy,
            "dollars": dollars,
            "number": number,
            "plain": lambda text: escaped(str(text or "")),
            "prose": _prose,
            "time": lambda at: str(at or "")[:19].replace("T", " "),
        }

    def _html(self, name: str, status: int = 200, **values: Any) -> Response:
        values |= {"has_fleet": self._sources.has_fleet, "has_login": self._tokens.needed}
        return HTMLResponse(self._templates.get_template(name).render(**values), status)

    def node(self, _request: Request) -> Response:
        try:
            picture, trouble = self._sources.node(), ""
        except FlowMeshError as error:
            picture, trouble = None, str(error)
        return self._html("node.html", here="node", picture=picture, trouble=trouble)

    def fleet(self, _request: Request) -> Response:
        try:
            picture, trouble = self._sources.fleet(), ""
        except FlowMeshError as error:
            picture, trouble = None, str(error)
        return self._html("fleet.html", here="fleet", picture=picture, trouble=trouble)

    def tasks(self, request: Request) -> Response:
        wanted = {name: request.query_params.get(name, "").strip()[:200] for name in FILTERS}
        given = request.query_params.get("limit", "")
        limit = min(MOST_SHOWN, int(given)) if given.isdecimal() and len(given) < 6 else SHOWN
        with Reader(self._sources.journal) as reader:
            running = [] if wanted["verdict"] else [each for each in reader.running() if _fits(each, wanted)][:limit]
            ended = (each for each in itertools.islice(reader.ended(), MOST_SCANNED) if _fits(each, wanted))
            found = list(itertools.islice(ended, limit + 1))
        return self._html(
            "tasks.html", here="tasks", running=running, ended=found[:limit], more=len(found) > limit,
            next=min(limit * 2, MOST_SHOWN), wanted=wanted, kinds=[kind.value for kind in Kind],
        )  # fmt: skip

    def task(self, request: Request) -> Response:
        task_id = wire.usable_task_id(request.path_params["task_id"])
        view = None if task_id is None else task_view.view(self._sources, task_id)
        if view is None:
            return self._html("missing.html", 404, here="", what="This node has no record of this task.")
        return self._html("task.html", here="tasks", **view)

    def log(self, request: Request) -> Response:
        task_id = wire.usable_task_id(request.path_params["task_id"])
        if task_id is None:
            return PlainTextResponse("no such task", 404)
        try:
            return PlainTextResponse(self._logs.text(task_id))
        except FlowMeshError as error:
            return PlainTextResponse(f"No log: {error}")  # in the place of the log

    def metrics(self, _request: Request) -> Response:
        try:
            return Response(self._sources.metrics(), headers={"content-type": CONTENT_TYPE})
        except FlowMeshError as error:
            return PlainTextResponse(f"{error}\n", 503)

    def health(self, request: Request) -> Response:
        """For probes: 503 where the node does not answer (`down`), else 200, also where it is `degraded`."""
        troubles: list[str] = []
        try:
            status = self._sources.status()
            troubles += [str(each) for each in status.get("redis_troubles") or ()]
            troubles += [str(each.get("reason")) for each in status.get("faults") or ()]
            troubles += [
                f"slot {each.get('slot')}: {each['reason']}" for each in status["workers"] if each.get("reason")
            ]
            if not status.get("redis_up") and not status.get("redis_troubles"):
                troubles.append("Redis does not answer")
            draining = status.get("draining") is not None
            word = "draining" if draining else "degraded" if troubles else "ok"
        except FlowMeshError as error:
            word, troubles = "down", [str(error)]
        shown = {"troubles": list(dict.fromkeys(troubles))} if request.scope["known"] else {}
        return JSONResponse({"status": word, **shown}, 503 if word == "down" else 200)

    async def login(self, request: Request) -> Response:
        if not self._tokens.needed:
            return RedirectResponse("/", 303)
        if request.method != "POST":
            return self._html("login.html", here="", wrong="")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BODY:
                return PlainTextResponse("the request is too large\n", 413)
        address = request.client.host if request.client is not None else ""
        if self._tokens.blocked(address):
            return self._html("login.html", 429, here="", wrong="Too many wrong tokens; wait a minute.")
        given = parse_qs(body.decode(errors="replace")).get("token", [""])[0]
        try:
            if not self._tokens.is_right(given.strip(), address):
                return self._html("login.html", 401, here="", wrong="This is not the token.")
            cookie = self._tokens.cookie()
        except ConfigError:
            return self._html("login.html", 503, here="", wrong="The token cannot be read: see `flowmesh doctor`.")
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, cookie, max_age=LASTS_S, httponly=True, samesite="strict", path="/")
        return response

    def failed(self, _request: Request, error: Exception) -> Response:
        return self._html("missing.html", 503, here="", what=str(error))

    def missing(self, request: Request, _error: Exception) -> Response:
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": "no such path"}, 404)
        return self._html("missing.html", 404, here="", what="There is no such page.")


def _fits(entry: Entry, wanted: dict[str, str]) -> bool:
    return (
        (not wanted["type"] or wanted["type"] == entry.type)
        and (not wanted["verdict"] or wanted["verdict"] == entry.verdict)
        and (not wanted["owner"] or wanted["owner"] == entry.owner)
        and (not wanted["task"] or wanted["task"] in entry.task_id or wanted["task"] in entry.name)
    )
