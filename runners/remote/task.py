"""An api task's sections as frozen structs, and the checks that need more than one field.

Field names are the document's own (docs/tasks.md, "api"). Null means "as if it were not there".
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from msgspec import Meta

from flowmesh.errors import FieldError
from flowmesh.messages.output import check_headers
from flowmesh.messages.serving import names_task
from flowmesh.web.origins import origin
from runners.agent.secrets import from_env
from runners.api import BadRequest, Context
from runners.data import addresses
from runners.data.sources import check_data
from runners.fields import Faults, check_spec
from runners.models.spec import Headers, Section
from runners.rows.resume import check_resume
from runners.served_model import check_name

OWN_FIELDS = ("data", "api", "resume")
SCRIPTED = "builtin:scripted"
"""An endpoint in the task itself, with one reply for all: for examples and tests."""
PATHS = {"chat": "/chat/completions", "completions": "/completions", "embeddings": "/embeddings"}
_OWN_OF_BODY = {"model": "api.model", "messages": "data", "prompt": "data", "input": "data"}
_NOT_TAKEN = {"stream": "answers are read whole", "n": "each item has one answer"}

Endpoint = Literal["chat", "completions", "embeddings"]
Price = Annotated[float, Meta(ge=0)]
Limit = Annotated[int, Meta(ge=1)]


class Prices(Section, frozen=True):
    """spec.api.prices: US dollars for a million tokens"""

    input: Price
    output: Price = 0.0
    cached_input: Price | None = None
    """Of a prompt's tokens that the endpoint had cached; default: as `input`."""


class Api(Section, frozen=True, rename={"timeout_s": "timeoutSec"}):
    """spec.api"""

    base_url: Annotated[str, Meta(min_length=1)]
    endpoint: Endpoint | None = None
    model: Annotated[str, Meta(min_length=1)] | None = None
    """Default: the first that the endpoint lists."""
    api_key_env: Annotated[str, Meta(min_length=1)] | None = None
    headers: Headers | None = None
    system_prompt: str | None = None
    body: dict[str, Any] | None = None
    """More of each request: temperature, max_tokens, response_format, tools, dimensions …"""
    concurrency: Annotated[int, Meta(ge=1, le=256)] | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    retries: Annotated[int, Meta(ge=0, le=20)] | None = None
    timeout_s: Annotated[float, Meta(gt=0, le=3600)] | None = None
    """Silence of the endpoint, in seconds, that ends an attempt."""
    prices: Prices | None = None
    max_cost_usd: Annotated[float, Meta(gt=0)] | None = None

    @property
    def kind(self) -> Endpoint:
        return self.endpoint or "chat"

    @property
    def shown(self) -> str:
        """The address, as results and errors have it."""
        return self.base_url.rstrip("/")

    def __repr__(self) -> str:
        return f"Api(base_url={self.shown!r})"


def read_api(ctx: Context, spec: dict[str, Any], where: str = "spec") -> Api:
    """The sections of `spec`, checked.

    Raises:
        BadRequest: naming all fields that are wrong.
    """
    faults = Faults()
    faults.read(lambda: check_spec(ctx, spec, where, OWN_FIELDS, {"api": Api}))
    api = faults.read(lambda: ctx.check(spec.get("api") or {}, Api, f"{where}.api"))
    faults.read(lambda: check_data(ctx, spec, where))
    faults.read(lambda: check_resume(ctx, spec, where))
    if api is not None:
        faults.read(lambda: _check(api, f"{where}.api"))
    if ctx.merge_children:
        faults.read(_refuse_children)
    faults.check()
    assert api is not None, "else it was a fault"
    return api


def key_of_endpoint(ctx: Context, api: Api, where: str = "spec.api") -> str | None:
    """The endpoint's key, from the variable that the document names.

    Raises:
        BadRequest: the operator does not let the variable be sent there, or it is not set.
    """
    name = api.api_key_env
    if name is None:
        return None
    given: Mapping[str, Any] = ctx.spec.get("env") or {}
    host, port = urlsplit(api.base_url).hostname or "", origin(api.base_url)[2]
    pairs = (f"{name}@{host}", f"{name}@{host}:{port}")
    own = name in given  # the document's own secret
    if not own and not any(fnmatch.fnmatchcase(pair, each) for pair in pairs for each in ctx.job.permits.api_keys):
        raise BadRequest(
            f"{where}.api_key_env: the node's setting tasks.api_keys does not let {name} be sent to {host}"
        )
    return from_env(name, f"{where}.api_key_env")


def check_address(ctx: Context, api: Api, where: str = "spec.api") -> None:
    """Raises BadRequest for an address of this machine that the operator does not allow (`tasks.local_hosts`)."""
    try:
        addresses.check(ctx.job.permits, api.base_url)
    except addresses.LocalAddress as error:
        raise BadRequest(f"{where}.base_url: {error}") from None


def _check(api: Api, where: str) -> None:
    faults = Faults()
    faults.read(lambda: _check_url(api.base_url, f"{where}.base_url"))
    if names_task(api.base_url) and api.api_key_env is not None:
        faults.read(lambda: _own_key(f"{where}.api_key_env"))
    faults.read(lambda: _check_headers(api.headers or {}, f"{where}.headers"))
    for name in api.body or {}:
        faults.read(lambda name=name: _check_body(name, f"{where}.body.{name}"))  # type: ignore[misc]
    if api.system_prompt is not None and api.kind != "chat":
        faults.read(lambda: _only_chat(f"{where}.system_prompt"))
    if api.max_cost_usd is not None and api.prices is None:
        faults.read(lambda: _needs_prices(f"{where}.max_cost_usd"))
    faults.check()


def _check_url(url: str, where: str) -> None:
    check_name(url, where)
    if url == SCRIPTED or names_task(url):
        return
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise BadRequest(f"{where}: an http or https address is needed, such as https://HOST/v1, or task:ID")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise BadRequest(f"{where}: no user, password or query belongs there; use api_key_env")


def _check_headers(headers: dict[str, str], where: str) -> None:
    try:
        check_headers(headers, where)
    except FieldError as error:
        raise BadRequest(str(error)) from None


def _check_body(name: str, where: str) -> None:
    if name in _OWN_OF_BODY:
        raise BadRequest(f"{where}: comes from spec.{_OWN_OF_BODY[name]}; leave it out")
    if name in _NOT_TAKEN:
        raise BadRequest(f"{where}: {_NOT_TAKEN[name]}; leave it out")


def _own_key(where: str) -> None:
    raise BadRequest(f"{where}: a task that serves a model has a key of its own; leave it out")


def _only_chat(where: str) -> None:
    raise BadRequest(f"{where}: goes with endpoint 'chat'; leave it out")


def _needs_prices(where: str) -> None:
    raise BadRequest(f"{where}: needs spec.api.prices, by which the cost is counted")


def _refuse_children() -> None:
    raise BadRequest("merge_children: tasks of the type api run by themselves; send each one")
