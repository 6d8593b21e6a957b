"""What the agent tests share: configurations written by a test, and runs of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from runners.agent.runner import AgentRunner
from runners.api import Context

Agent = Callable[..., "Ran"]


class Ran:
    """A finished run."""

    def __init__(self, ctx: Context, result: dict[str, Any]) -> None:
        self.ctx = ctx
        self.result = result
        self.items: list[dict[str, Any]] = result["items"]
        self.output: str = self.items[0]["output"]

    @property
    def log(self) -> list[dict[str, Any]]:
        return log_of(self.ctx)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log if entry["event"] == name]


def log_of(ctx: Context) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ctx.out_dir / "execution_log.jsonl").read_text().splitlines()]


def write_config(folder: Path, url: str, config: dict[str, Any] | None = None, name: str = "test") -> None:
    folder.mkdir(exist_ok=True)
    model = {"base_url": url, "retries": 0, **(config or {}).get("model", {})}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**(config or {}), "model": model}))


def run_agent(
    make_context: Callable[..., Context],
    folder: Path,
    url: str,
    *,
    config: dict[str, Any] | None = None,
    spec: dict[str, Any] | None = None,
    limits: dict[str, Any] | None = None,
    **fields: Any,
) -> Ran:
    """Run one agent task with a configuration of the test's, in `folder`."""
    ctx = agent_context(make_context, folder, url, config=config, spec=spec, limits=limits, **fields)
    result = AgentRunner().run(ctx)
    json.dumps(result, allow_nan=False)
    return Ran(ctx, result)


def agent_context(
    make_context: Callable[..., Context],
    folder: Path,
    url: str,
    *,
    config: dict[str, Any] | None = None,
    spec: dict[str, Any] | None = None,
    limits: dict[str, Any] | None = None,
    **fields: Any,
) -> Context:
    write_config(folder, url, config)
    whole = {"configName": "test", **({"task": "do it"} if spec is None or "data" not in spec else {}), **(spec or {})}
    return make_context(whole, task_type="agent", limits={"agents_dir": str(folder), **(limits or {})}, **fields)
