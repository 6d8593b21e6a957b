"""A document that names another task's model: what is sent to it, what is not, and which addresses are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("smolagents", reason="needs the extra 'agent'")
pytest.importorskip("openai", reason="needs the extra 'api'")

from flowmesh.messages.job import Permits
from flowmesh.messages.serving import Served
from runners import child
from runners.api import BadRequest
from runners.remote.runner import ApiRunner
from runners.remote.task import read_api
from runners.served_model import served_model
from tests.kit.agent_support import run_agent
from tests.kit.openai_server import Say, Server, answer

KEY = "key-of-the-served-model"
DATA = {"type": "list", "items": ["hello"]}


def served(base_url: str, *, own: bool = True) -> Served:
    return Served(task_id="s1", base_url=base_url, model="tiny", api_key=KEY, own=own)


def test_a_request_goes_to_the_task_with_its_key_and_its_model(make_context) -> None:
    with Server(decide=lambda _: Say(f"it is {KEY}")) as server:
        given = served(server.url)
        spec = {"taskType": "api", "data": DATA, "api": {"base_url": "task:s1"}}
        ctx = make_context(
            spec, task_type="api", served=given, permits=Permits(), runner="runners.remote.runner:ApiRunner"
        )
        outcome = child.run(ctx.job, ctx)
    assert outcome.ok, outcome.message
    assert (outcome.result or {})["endpoint"]["base_url"] == "task:s1"
    assert KEY not in repr(outcome.result)
    assert KEY not in repr(given)
    (request,) = server.requests
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body["model"] == "tiny"


def test_an_agent_sends_nothing_there_that_is_meant_for_its_own_endpoint(
    make_context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPERATORS_KEY", "operators-own-key")
    own = {"name": "big", "api_key_env": "OPERATORS_KEY", "headers": {"X-Team": "secret-team"}}
    with Server(answer("yes")) as server:
        ran = run_agent(
            make_context,
            tmp_path / "agents",
            "http://127.0.0.1:9/v1",
            config={"model": own},
            spec={"agent": {"base_url": "task:s1"}},
            served=served(server.url),
        )
    assert ran.output == "yes"
    assert ran.result["model"] == "tiny"
    for request in server.requests:
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert "x-team" not in request.headers
        assert request.body["model"] == "tiny"
    assert KEY not in (ran.ctx.out_dir / "execution_log.jsonl").read_text()


@pytest.mark.parametrize(
    ("base_url", "permits", "why"),
    [
        ("http://127.0.0.1:8000/v1", Permits(), "on another node at 127.0.0.1, which leads to this machine here"),
        ("http://[::ffff:169.254.169.254]/v1", Permits(), "tasks.local_hosts"),
        ("http://metadata.internal/v1", Permits(), "not http://IP:PORT"),
        ("file:///etc/passwd", Permits(), "not http://IP:PORT"),
        ("http://127.0.0.1:8000/v1", Permits(local_hosts=("127.0.0.1:8000",)), ""),
        ("http://10.0.0.7:8000/v1", Permits(), ""),
    ],
)
def test_an_address_in_redis_is_checked_as_one_of_the_document(
    make_context, base_url: str, permits: Permits, why: str
) -> None:
    ctx = make_context({}, permits=permits, served=served(base_url, own=False))
    if not why:
        assert served_model(ctx, "task:s1", "spec.api.base_url") is not None
        return
    with pytest.raises(BadRequest) as refused:
        served_model(ctx, "task:s1", "spec.api.base_url")
    assert why in str(refused.value)
    assert str(refused.value).startswith("spec.api.base_url: ")


@pytest.mark.parametrize(
    ("api", "message"),
    [
        ({"base_url": "task:"}, "spec.api.base_url: expected the id of a task behind 'task:'"),
        ({"base_url": "task:a/b"}, "spec.api.base_url: expected the id of a task"),
        ({"base_url": "task:s1", "api_key_env": "K"}, "spec.api.api_key_env: a task that serves a model has a key"),
    ],
)
def test_a_name_that_is_none_is_refused(make_context, api: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read_api(make_context({}), {"taskType": "api", "data": DATA, "api": api})
    assert message in str(refused.value)


def test_without_a_node_that_looks_it_up_the_field_is_named(make_context) -> None:
    spec = {"taskType": "api", "data": DATA, "api": {"base_url": "task:s1"}}
    with pytest.raises(BadRequest, match=r"spec\.api\.base_url: this node does not look up"):
        ApiRunner().run(make_context(spec, task_type="api"))
