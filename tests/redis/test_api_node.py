"""A task of the type `api` on a node: what it paid is in `flowmesh cost`, also where its budget ended it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("openai", reason="needs the extra 'api'")
from click.testing import CliRunner

from flowmesh.cli.main import cli
from tests.kit.openai_server import Say, Server
from tests.kit.support import Node, Orchestrator

pytestmark = pytest.mark.redis


def test_what_it_paid_is_in_the_costs_of_the_node(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node("--set", "tasks.local_hosts=127.0.0.1")
    with Server(decide=lambda _: Say("ok", usage=(1000, 0))) as server:
        api = {"base_url": server.url, "model": "m", "prices": {"input": 1.0}, "concurrency": 1}
        spec = {"taskType": "api", "data": {"type": "list", "items": ["a", "b", "c"]}, "api": api}
        orchestrator.dispatch("w1", spec, "whole")
        assert orchestrator.wait_end("whole")["type"] == "TASK_SUCCEEDED"
        orchestrator.dispatch("w1", {**spec, "api": {**api, "max_cost_usd": 0.0025}}, "budget")
        end = orchestrator.wait_end("budget")
    assert end["type"] == "TASK_FAILED"
    assert end["payload"]["rows"] == {"done": 2, "total": 3}
    assert [item["output"] for item in node.result("budget")["items"]] == ["ok", "ok"]
    done = CliRunner().invoke(cli, ["cost", "--by", "task", "--json", "--state-dir", str(node.state_dir)])
    sums = {each["of"]: each["api_usd"] for each in json.loads(done.output)["sums"]}
    assert sums == {"whole": pytest.approx(0.003), "budget": pytest.approx(0.002)}
