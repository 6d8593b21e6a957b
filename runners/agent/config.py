"""Agent configurations: YAML files in the node's agents folder, by name, one extending another, as frozen structs.

A configuration is the node operator's: it may start programs and name addresses. A task only chooses one by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runners.models.spec import Section

Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Identifier = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Serve(Section, frozen=True):
    """A local endpoint that the task starts, and that ends with it."""

    command: Annotated[tuple[str, ...], Meta(min_length=1)]
    """`{port}` is replaced by a free port, `{python}` by this Python, `{agents}` by the agents folder."""
    path: str = "/v1"
    ready_timeout_s: Seconds = 300.0
    env_from: tuple[str, ...] = ()
    """Variables passed to it, besides PATH, HOME and the like."""


class Model(Section, frozen=True):
    """Which model the agents use."""

    type: Literal["openai", "local"] = "openai"
    name: str | None = None
    """openai: the model's name there; default: the first that the endpoint lists."""
    base_url: str | None = None
    api_key_env: str | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    serve: Serve | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_tokens: Count | None = None
    seed: int | None = None
    stream: bool = False
    tool_choice: Literal["auto", "required", "none"] = "auto"
    """none: no tools in the request; the model is asked to write its calls as JSON."""
    timeout_s: Seconds = 300.0
    """Of one request: time until its answer begins, or until the next bytes of it arrive."""
    retries: Annotated[int, Meta(ge=0, le=10)] = 3
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
    """Further fields of each request."""
    identifier: str | None = None
    """local: a hub id, a folder, or builtin:tiny-llama."""
    revision: str | None = None
    enforce_cpu: bool = False


class Fetch(Section, frozen=True):
    """tools.fetch_page"""

    allow_private: bool = False
    """Also addresses that are not public: this machine's and its network's."""
    allow_hosts: tuple[str, ...] = ()
    """Only these hosts and their subdomains; empty: all."""
    timeout_s: Seconds = 30.0
    max_bytes: Count = 10 * 2**20


class WebSearch(Section, frozen=True):
    """tools.web_search"""

    provider: str = "default"
    results: Annotated[int, Meta(ge=1, le=50)] = 5


class Tools(Section, frozen=True):
    """The tools that are on."""

    python: bool = False
    shell: bool = False
    files: bool = False
    documents: bool = False
    fetch_page: Fetch | bool = False
    web_search: WebSearch | bool = False


class McpServer(Section, frozen=True):
    """One MCP server whose tools the agent gets."""

    transport: Literal["stdio", "sse", "streamable_http"]
    command: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = msgspec.field(default_factory=dict)
    env_from: tuple[str, ...] = ()
    url: str | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    tools: tuple[str, ...] | None = None
    """Only these of its tools; default: all."""
    timeout_s: Seconds = 60.0
    """Of connecting, and of each call."""


class SandboxBounds(Section, frozen=True):
    """What one command of an agent may use."""

    timeout_s: Seconds = 60.0
    memory_bytes: Annotated[int, Meta(ge=32 * 2**20)] = 2 * 2**30
    processes: Count = 64
    disk_bytes: Annotated[int, Meta(ge=2**20)] = 2 * 2**30
    network: bool = False
    """Takes effect only where the node allows it (runners.agent_network)."""


class Worker(Section, frozen=True):
    """One member of a team."""

    description: str
    instructions: str = ""
    tools: Tools | None = None
    mcp_servers: tuple[str, ...] | None = None
    """Names of the configuration's servers; default: all of them."""
    max_turns: Count | None = None


class Planner(Section, frozen=True):
    """The role that plans, and in a workforce assigns and reviews."""

    instructions: str = ""
    max_steps: Annotated[int, Meta(ge=1, le=50)] = 8
    max_attempts: Annotated[int, Meta(ge=1, le=10)] = 2
    """workforce: attempts at one step."""


class Reporter(Section, frozen=True):
    """The role that writes the answer."""

    instructions: str = ""


class AgentConfig(Section, frozen=True):
    """A whole configuration."""

    type: Literal["simple", "orchestra", "workforce"] = "simple"
    description: str = ""
    model: Model = Model()
    instructions: str = ""
    max_turns: Count = 20
    timeout_s: Seconds | None = None
    """Of one run; a task's agent.timeout wins."""
    tools: Tools = Tools()
    mcp_servers: dict[Identifier, McpServer] = msgspec.field(default_factory=dict)
    sandbox: SandboxBounds = SandboxBounds()
    planner: Planner = Planner()
    workers: dict[Identifier, Worker] = msgspec.field(default_factory=dict)
    reporter: Reporter = Reporter()


class SearchProvider(Section, frozen=True):
    """One entry of search_providers.yaml: how to query an HTTP endpoint, and where its answer holds the results."""

    url: str
    method: Literal["GET", "POST"] = "GET"
    params: dict[str, Any] = msgspec.field(default_factory=dict)
    """`{query}` and `{count}` in a value are replaced. The query string of GET, the JSON body of POST."""
    api_key_env: str | None = None
    api_key_header: str = "Authorization"
    api_key_prefix: str = ""
    results: str = "results"
    """Path to the list."""
    title: str = "title"
    link: str = "url"
    snippet: str = "content"
    timeout_s: Seconds = 20.0
