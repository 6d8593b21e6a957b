"""Spans of tasks, as a real OTLP/HTTP receiver decodes them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fake_http import FakeHandler, FakeServer
from tests.kit.support import Node, Orchestrator, RedisServer, running, until

pytestmark = pytest.mark.redis
if not os.environ.get("CI"):
    pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADER = "token-of-the-collector"


class Collector(FakeServer):
    def __init__(self) -> None:
        super().__init__(Handler)
        self.refuses = 2
        """So many of the next requests; with 400, as the exporter repeats a 503 itself, with pauses of seconds."""
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []

    def of_task(self, task_id: str) -> dict[str, Any]:
        """The spans right below a task's own by name, once they are there; its own is `""`."""

        def there() -> Any:
            with self.lock:
                return next((s for s in self.spans if attributes(s).get("task.id") == task_id), None)

        own = until(there, f"the span of {task_id}")
        with self.lock:
            return {"": own} | {span.name: span for span in self.spans if span.parent_span_id == own.span_id}

    def below(self, span: Any) -> set[str]:
        """The names of the spans below one."""
        with self.lock:
            return {each.name for each in self.spans if each.parent_span_id == span.span_id}


class Handler(FakeHandler):
    server: Collector

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
            ExportTraceServiceResponse,
        )

        body = self.body()
        assert self.path == "/v1/traces"
        if self.headers.get("authorization") != f"Bearer {HEADER}":
            self.answer(401, b"")
            return
        with self.server.lock:
            if self.server.refuses:
                self.server.refuses -= 1
                self.answer(400, b"")
                return
            request = ExportTraceServiceRequest.FromString(body)
            for each in request.resource_spans:
                self.server.resources.append(attributes(each.resource))
                for scope in each.scope_spans:
                    self.server.spans += scope.spans
        self.answer(200, ExportTraceServiceResponse().SerializeToString(), {"Content-Type": "application/x-protobuf"})


def attributes(of: Any) -> dict[str, Any]:
    return {
        each.key.removeprefix("flowmesh."): getattr(each.value, each.value.WhichOneof("value"))
        for each in of.attributes
    }


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def node(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    redis = RedisServer()
    headers = tmp_path_factory.mktemp("otel") / "headers"
    headers.write_text(f"Authorization: Bearer {HEADER}\n")
    config = (
        f'[otel]\nendpoint = "{collector.origin}"\nheaders_file = "{headers}"\n'
        '[tasks]\nallow_command = ["*"]\n[results]\nmin_free_bytes = 0\n'
    )
    env = {"OTEL_BSP_SCHEDULE_DELAY": "20", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test"}
    try:
        with running(Node(redis, config=config, env=env)) as node:
            yield node
    finally:
        redis.close()


@pytest.fixture
def peer(node: Node) -> Iterator[Orchestrator]:
    peer = Orchestrator(node.server)
    yield peer
    peer.close()


def dispatch(peer: Orchestrator, spec: dict[str, Any], **metadata: Any) -> str:
    """With metadata of the document."""
    task_id = f"t{os.urandom(4).hex()}"
    document = {"apiVersion": "flowmesh/v1", "kind": "Task", "metadata": metadata, "spec": spec}
    message = {"task_id": task_id, "task": document, "assigned_worker": "w1", "dispatched_at": task_id}
    peer.redis.publish("tasks", json.dumps(message))
    return task_id


def test_a_task_joins_the_trace_of_its_document_and_its_program_joins_it(
    node: Node, peer: Orchestrator, collector: Collector
) -> None:
    program = {"taskType": "command", "command": ["sh", "-c", "env"]}
    task = dispatch(peer, program, traceparent=f"00-{TRACE}-{SPAN}-01", tracestate="a=b")
    end = peer.wait_end(task)
    assert end["type"] == "TASK_SUCCEEDED", end
    spans = collector.of_task(task)
    own = spans[""]
    assert (own.trace_id.hex(), own.parent_span_id.hex(), own.trace_state) == (TRACE, SPAN, "a=b")
    assert own.name == "task command"
    assert own.status.code == 1
    assert {"queued", "launch", "run", "release", "deliver"} <= spans.keys()
    for each in spans.values():
        times = own.start_time_unix_nano, each.start_time_unix_nano, each.end_time_unix_nano, own.end_time_unix_nano
        assert list(times) == sorted(times), each.name
    assert collector.below(spans["run"]) == set(end["payload"]["phases"])
    found = attributes(own)
    assert (found["task.verdict"], found["worker.id"]) == ("ok", "w1")
    resource = collector.resources[-1]
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("flowmesh", "test")
    logs = "".join(path.read_text() for path in Path(node.results_dir, task, "logs").glob("std*.log"))
    (header,) = set(re.findall(r"TRACEPARENT=(\S+)", logs))
    assert header == f"00-{TRACE}-{own.span_id.hex()}-01"
    assert "TRACESTATE=a=b" in logs
    assert HEADER not in logs


def test_without_a_traceparent_or_with_a_malformed_one_a_task_has_a_trace_of_its_own(
    peer: Orchestrator, collector: Collector
) -> None:
    bad = dispatch(peer, {"taskType": "echo"}, traceparent=["no", "text"])
    event = peer.wait_end(bad)
    assert event["type"] == "TASK_SUCCEEDED"
    assert any(line.startswith("metadata.traceparent: ignored") for line in event["payload"]["warnings"])
    refused = dispatch(peer, {"taskType": "echo", "delaySec": "x"}, traceparent=f"00-{TRACE}-{SPAN}-01")
    assert peer.wait_end(refused)["payload"]["error_kind"] == "bad_request"
    own, other = collector.of_task(bad)[""], collector.of_task(refused)[""]
    assert not own.parent_span_id
    assert own.trace_id.hex() != TRACE == other.trace_id.hex()
    assert (other.status.code, attributes(other)["error.type"]) == (2, "bad_request")
    assert "delaySec" in other.status.message


def test_a_trace_that_is_not_recorded_gets_no_span_and_is_passed_on(
    node: Node, peer: Orchestrator, collector: Collector
) -> None:
    program = {"taskType": "command", "command": ["sh", "-c", "env"]}
    unseen = dispatch(peer, program, traceparent=f"00-{TRACE}-{SPAN}-00")
    peer.wait_end(unseen)
    collector.of_task(peer.run("w1", {"taskType": "echo"})["task_id"])
    assert not [span for span in collector.spans if attributes(span).get("task.id") == unseen]
    logs = "".join(path.read_text() for path in Path(node.results_dir, unseen, "logs").glob("std*.log"))
    assert re.search(rf"TRACEPARENT=00-{TRACE}-[0-9a-f]{{16}}-00", logs)


def test_an_adopted_task_keeps_its_span_over_a_sigkill_and_an_outage_of_the_collector(
    node: Node, peer: Orchestrator, collector: Collector, tmp_path: Path
) -> None:
    with collector.lock:
        collector.refuses = 1
    task = dispatch(
        peer, {"taskType": "command", "command": ["sh", "-c", f"env; until [ -e {tmp_path}/go ]; do sleep 0.1; done"]}
    )
    peer.wait_started(task)
    logs = Path(node.results_dir, task, "logs")
    until(lambda: any("TRACEPARENT" in path.read_text() for path in logs.glob("std*.log")), "it has begun")
    node.kill()
    node.start()
    (tmp_path / "go").touch()
    peer.wait_end(task)
    header = next(m[1] for path in logs.glob("std*.log") if (m := re.search(r"TRACEPARENT=(\S+)", path.read_text())))
    spans = collector.of_task(task)
    assert header == f"00-{spans[''].trace_id.hex()}-{spans[''].span_id.hex()}-01"
    assert {"queued", "launch", "run", "deliver"} <= spans.keys()
    (receiver,) = node.ask(op="status")["notify"]
    assert receiver["to"] == "OpenTelemetry"
