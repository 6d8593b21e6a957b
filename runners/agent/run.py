"""One agent task: its configuration, model, MCP servers and journal, and the run of each item."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.redaction import Redactor
from runners.agent import sandbox, serve
from runners.agent.command import Bounds, end_all
from runners.agent.config import AgentConfig, SearchProvider, Tools
from runners.agent.config_files import agents_folder, load_config, load_provider
from runners.agent.endpoint import Endpoint
from runners.agent.event_loop import EventLoop
from runners.agent.journal import Journal
from runners.agent.mcp_bridge import McpBridge
from runners.agent.models import AgentModel, EndpointModel, LocalModel, NoAnswer, model_of
from runners.agent.rows import config_digest, item_folder
from runners.agent.sandbox import Sandbox
from runners.agent.solo import Bench, Member, Outcome, work
from runners.agent.task import AgentTask
from runners.agent.team import orchestra, workforce
from runners.agent.tools import Kit, build_tools, search_of
from runners.agent.watch import OutOfTime, Watch
from runners.agent.web import check_provider
from runners.agent.workspace import Workspace
from runners.api import BadRequest, Context, RunnerError
from runners.rows.keys import key_of
from runners.served_model import served_model

LONE = "agent"


class Session:
    """One task. `close` ends all that `open` started."""

    def __init__(self, ctx: Context, task: AgentTask, redact: Redactor) -> None:
        """
        Raises:
            BadRequest: the configuration is wrong.
        """
        self._ctx = ctx
        self._task = task
        self._redact = redact
        self._config = load_config(ctx, task.config_name, task.config_where)
        self._name = task.config_name
        self._timeout_s = task.timeout_s or self._config.timeout_s
        self._providers = self._load_providers()
        self._bounds = self._load_bounds()
        if self._bounds is not None:
            sandbox.best_mode()  # raised before anything is loaded
        self.journal = Journal(ctx, redact)
        self._stack = contextlib.ExitStack()
        self._stack.callback(self.journal.close)
        self._loop = EventLoop()
        self._stack.callback(self._loop.close)
        self._bridge = McpBridge(self._config.mcp_servers, redact, f"{self._name}.mcp_servers", self._loop)
        self._model: AgentModel | None = None
        self._confinement: dict[str, str] | None = None
        self._box: Sandbox | None = None
        """Of the current run."""
        self._dropped: list[str] = []

    def open(self) -> None:
        """Load the model or find it at its endpoint, and start the MCP servers.

        Raises:
            BadRequest, RunnerError: one of them cannot be loaded, reached or started.
            Cancelled: the node asked the task to stop.
        """
        ctx, config = self._ctx, self._config
        watch = Watch(ctx, None)
        ctx.phase("load")
        served = served_model(ctx, self._task.base_url or "", "spec.agent.base_url")
        wanted = config.model if served is None else model_of(config.model, served)
        if wanted.type == "local":
            self._model = LocalModel(ctx, wanted)
        else:
            where = f"{self._name}.model"
            base_url = wanted.base_url or ""
            if wanted.serve is not None:
                agents = agents_folder(ctx)
                started = serve.endpoint(ctx, wanted.serve, agents, watch, f"{where}.serve", redact=self._redact)
                base_url = self._stack.enter_context(started)
            direct = served is not None or wanted.serve is not None
            endpoint = Endpoint(wanted, base_url, self._redact, where, self._loop, direct=direct)
            self._stack.callback(endpoint.close)
            self._model = EndpointModel(endpoint, wanted, watch)
        self._stack.enter_context(self._bridge)
        self._bridge.open(watch)

    def close(self) -> None:
        end_all()
        self._stack.close()

    @property
    def model_name(self) -> str:
        return "" if self._model is None else str(self._model.model_id)

    def row_keys(self) -> list[str]:
        """The key of each item's row; `open` has been called."""
        model = self._model
        assert model is not None, "open has been called"
        same = key_of(config_digest(self._config, self._max_turns), model.model_id, model.weights)
        return [key_of("agent", text, same) for text in self._task.tasks]

    def tokens(self) -> tuple[int, int]:
        """Of the prompts and the answers so far."""
        return (0, 0) if self._model is None else (self._model.prompt_tokens, self._model.completion_tokens)

    def run_item(self, index: int, text: str) -> dict[str, Any]:
        """Run one item; its entry of the result. Its failure does not affect other items.

        Raises:
            Cancelled: the node asked the task to stop.
        """
        since = time.monotonic()
        folder = item_folder(self._ctx.out_dir, index, batch=self._task.batch)
        workspace = Workspace(folder)
        watch = Watch(self._ctx, self._timeout_s)
        self.journal.note(index, LONE, "task", task=text)
        output, error = "", ""
        problems: tuple[str, ...] = ()
        try:
            outcome = self._work(index, text, workspace, watch)
            output, problems = outcome.text, outcome.problems
            if outcome.out_of_turns:
                error = f"max_turns: no answer after {self._max_turns} turns; the output is what it had by then"
        except OutOfTime as late:
            error = str(late)
        except NoAnswer as problem:
            output, error = self._redact(problem.text), self._redact(str(problem))
        except RunnerError as problem:
            error = self._redact(str(problem))
        finally:
            left = [] if self._box is None else self._box.left
            self._dropped += [f"{folder.name}/{name}" for name in dict.fromkeys([*left, *workspace.tidy()])]
        entry: dict[str, Any] = {"index": index, "output": output, "finish_reason": "failed" if error else "completed"}
        if error:
            entry["error"] = error
            self.journal.note(index, LONE, "failed", error=error)
        else:
            self.journal.note(index, LONE, "answer", text=output)
        if problems:
            entry["problems"] = list(problems)
        entry["execution_time_sec"] = round(time.monotonic() - since, 6)
        return entry

    def counts(self) -> dict[str, Any]:
        """For the result's usage."""
        model, events = self._model, self.journal.counts
        assert model is not None, "open has been called"
        return {
            "model_requests": model.requests,
            "tool_calls": events["tool_call"],
            "prompt_tokens": model.prompt_tokens,
            "completion_tokens": model.completion_tokens,
            "total_tokens": model.prompt_tokens + model.completion_tokens,
        }

    def describe(self) -> dict[str, Any]:
        """For the result's metadata."""
        about: dict[str, Any] = {"agent_type": self._config.type}
        if self._confinement is not None:
            about["sandbox"] = self._confinement
        if self._dropped:
            about["files_dropped"] = self._redact.deep(self._dropped[:50])
        return about

    def _work(self, index: int, text: str, workspace: Workspace, watch: Watch) -> Outcome:
        model = self._model
        assert model is not None, "open has been called"
        model.watch = watch
        bench = Bench(item=index, model=model, watch=watch, journal=self.journal, redact=self._redact)
        kit = Kit(
            watch=watch,
            workspace=workspace,
            sandbox=self._sandbox(workspace.folder),
            providers=self._providers,
            redact=self._redact,
        )
        config = self._config
        if config.type == "simple":
            return work(self._member(LONE, config.instructions, config.tools, None, kit), text, bench)
        members = {
            name: self._member(
                name,
                f"{config.instructions}\n{worker.instructions}",
                worker.tools if worker.tools is not None else config.tools,
                worker.mcp_servers,
                kit,
                max_turns=worker.max_turns,
            )
            for name, worker in config.workers.items()
        }
        return (orchestra if config.type == "orchestra" else workforce)(config, members, text, bench)

    def _member(
        self,
        name: str,
        instructions: str,
        tools: Tools,
        servers: tuple[str, ...] | None,
        kit: Kit,
        *,
        max_turns: int | None = None,
    ) -> Member:
        specs = build_tools(tools, kit)
        taken = {spec.name for spec in specs} | {"final_answer"}
        for spec in self._bridge.tools(servers, kit.watch):
            unique = spec if spec.name not in taken else msgspec.structs.replace(spec, name=f"mcp_{spec.name}")
            taken.add(unique.name)
            specs.append(unique)
        return Member(name=name, instructions=instructions, tools=specs, max_turns=max_turns or self._max_turns)

    @property
    def _max_turns(self) -> int:
        return self._task.max_turns or self._config.max_turns

    def _sandbox(self, folder: Path) -> Sandbox | None:
        if self._bounds is None:
            return None
        self._box = Sandbox(folder, self._bounds)
        self._confinement = self._box.describe()
        return self._box

    def _all_tools(self) -> Iterator[tuple[str, Tools]]:
        config: AgentConfig = self._config
        if config.type == "simple" or any(worker.tools is None for worker in config.workers.values()):
            yield f"{self._name}.tools", config.tools
        for name, worker in config.workers.items():
            if worker.tools is not None:
                yield f"{self._name}.workers.{name}.tools", worker.tools

    def _load_providers(self) -> dict[str, SearchProvider]:
        providers = {}
        for where, tools in self._all_tools():
            if (wanted := search_of(tools)) is not None:
                provider = load_provider(self._ctx, wanted.provider, f"{where}.web_search.provider")
                check_provider(provider, wanted.provider)
                providers[wanted.provider] = provider
        return providers

    def _load_bounds(self) -> Bounds | None:
        if not any(tools.python or tools.shell for _, tools in self._all_tools()):
            return None
        wanted = self._config.sandbox
        if wanted.network and not self._ctx.job.limits.get("agent_network", False):
            raise BadRequest(
                f"{self._name}.sandbox.network: this node allows no network to agents' code (runners.agent_network)"
            )
        return Bounds(**msgspec.structs.asdict(wanted))
