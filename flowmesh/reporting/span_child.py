"""Entry point of the child that sends spans over OTLP/HTTP: the only process of a node that imports OpenTelemetry."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh import installed
from flowmesh.errors import ConfigError
from flowmesh.processes.pipe import Pipe
from flowmesh.reporting.batch import Answer, Item, add_answer, read_batch
from flowmesh.reporting.spans import Span, Trace
from flowmesh.settings.secret_files import read_secret

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

SERVICE = "flowmesh"
HEADERS_KEY = "otel.headers_file"
PATH = "/v1/traces"


class Collector(msgspec.Struct, frozen=True, kw_only=True):
    """Where to send."""

    endpoint: str | None
    """None: OpenTelemetry's variables say it."""
    headers_file: str | None
    node_id: str
    host: str


def main(_pipe: Pipe, folder: Path) -> int:
    """Send all spans in one request; what became of it is in the answers' file."""
    batch = read_batch(folder)
    try:
        error = _send(msgspec.json.decode(batch.receiver, type=Collector), batch.items)
    except ConfigError as failed:
        error = str(failed)
    except ImportError as failed:
        error = f"{failed}: {installed.install_command('otel')}"
    for item in batch.items:
        add_answer(folder, Answer(id=item.id, error=error))
        if error:
            return 1
    return 0


def read_headers(path: str) -> dict[str, str]:
    """The headers in a file, one `Name: value` a line.

    Raises:
        ConfigError: it cannot be read, or a line is none. Never shows the content.
    """
    headers = {}
    for number, line in enumerate(read_secret(path, HEADERS_KEY).splitlines(), 1):
        name, colon, value = line.partition(":")
        if not line.strip():
            continue
        if not colon or not name.strip().isascii() or " " in name.strip() or not value.strip():
            raise ConfigError(f"{HEADERS_KEY}: line {number} is not `Name: value`")
        headers[name.strip().lower()] = value.strip()
    return headers


def _send(collector: Collector, items: tuple[Item, ...]) -> str:
    """Why they did not arrive; empty: they did."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import SpanExportResult

    about = {"service.version": installed.version(), "service.instance.id": collector.node_id}
    about["host.name"] = collector.host
    if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        about["service.name"] = SERVICE
    resource = Resource.create(about)
    heard = _Heard()
    logging.getLogger("opentelemetry").addHandler(heard)
    exporter = OTLPSpanExporter(
        endpoint=None if collector.endpoint is None else collector.endpoint.rstrip("/") + PATH,
        headers=None if collector.headers_file is None else read_headers(collector.headers_file),
    )
    spans = [span for item in items for span in _spans(msgspec.msgpack.decode(item.body, type=Trace), resource)]
    if exporter.export(spans) is SpanExportResult.SUCCESS:
        return ""
    return heard.last or "the collector did not take them"


def _spans(trace: Trace, resource: Any) -> Iterator[ReadableSpan]:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

    scope = InstrumentationScope("flowmesh", installed.version())
    state = TraceState.from_header([trace.state]) if trace.state else TraceState()

    def context(span_id: str, *, remote: bool = False) -> SpanContext:
        return SpanContext(int(trace.trace_id, 16), int(span_id, 16), remote, TraceFlags(TraceFlags.SAMPLED), state)

    def status(span: Span) -> Status:
        if span.ok is None:
            return Status(StatusCode.UNSET)
        return Status(StatusCode.OK) if span.ok else Status(StatusCode.ERROR, span.message)

    for index, span in enumerate(trace.spans):
        yield ReadableSpan(
            name=span.name,
            context=context(span.span_id),
            parent=context(span.parent_id, remote=index == 0) if span.parent_id else None,
            resource=resource,
            attributes=span.attributes,
            kind=SpanKind.CONSUMER if index == 0 else SpanKind.INTERNAL,
            status=status(span),
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=scope,
        )


class _Heard(logging.Handler):
    """Keeps what the exporter logs last: it returns no reason."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.last = " ".join(record.getMessage().split())[:300]
