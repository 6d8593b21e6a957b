"""The document of a serving task: names, addresses, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from flowmesh.messages.job import Permits
from runners.api import BadRequest
from runners.serve.task import check_allowed, read_serve


def spec_of(identifier: str = "owner/model", **fields: Any) -> dict[str, Any]:
    return {"taskType": "serve", "model": {"source": {"identifier": identifier}}, "serve": fields}


@pytest.mark.parametrize(
    ("identifier", "name"),
    [("owner/model", "owner/model"), ("/secret/place/small", "small"), ("./small/", "small"), ("~/m", "m")],
)
def test_the_name_of_a_served_model_shows_no_path_of_the_node(make_context, identifier: str, name: str) -> None:
    ctx = make_context({})
    assert read_serve(ctx, spec_of(identifier)).name == name
    assert read_serve(ctx, spec_of(identifier, served_model_name="given")).name == "given"


@pytest.mark.parametrize(
    ("allowed", "host", "fits"),
    [
        ((), "127.0.0.1", False),
        (("127.0.0.1",), "127.0.0.1", True),
        (("127.0.0.1",), "0.0.0.0", False),
        (("0.0.0.0",), "0.0.0.0", True),
        (("::1",), "0:0::1", True),
        (("*",), "10.0.0.7", True),
    ],
)
def test_a_task_listens_where_the_operator_allows_it(make_context, allowed: Any, host: str, fits: bool) -> None:
    ctx = make_context({}, permits=Permits(serve=allowed))
    serve = read_serve(ctx, spec_of(host=host)).serve
    if fits:
        check_allowed(ctx, serve)
    else:
        with pytest.raises(BadRequest, match=r"spec.serve.host: .* tasks.allow_serve"):
            check_allowed(ctx, serve)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"serve": {"host": "localhost"}}, "spec.serve.host: expected an IP address"),
        ({"serve": {"port": -1}}, "spec.serve.port"),
        ({"serve": {"idle_s": 0}}, "spec.serve.idle_s"),
        ({"serve": {"ttl": 5}}, "spec.serve.ttl"),
        ({"serve": {"tool_call_parser": ""}}, "spec.serve.tool_call_parser"),
        ({"model": {}}, "spec.model.source.identifier: missing"),
        ({"ttl_s": 5}, "spec.ttl_s: unknown field; it belongs into spec.serve"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make_context, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read_serve(make_context({}), spec_of() | change)
    assert message in str(refused.value)
