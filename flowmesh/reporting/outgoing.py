"""What a node sends to others about a task's end, and the lanes on which: webhooks, and a trace collector."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

import msgspec
from loguru import logger

from flowmesh import installed
from flowmesh.reporting import spans
from flowmesh.reporting.sender import Lane
from flowmesh.reporting.span_child import Collector
from flowmesh.reporting.spans import Spans
from flowmesh.reporting.webhooks import Webhooks
from flowmesh.settings.schema import Settings
from flowmesh.settings.secret_files import secret_path
from flowmesh.tasks.history import Found
from flowmesh.tasks.sendings_table import Sending

ENTRY = "flowmesh.reporting.span_child:main"
BATCH = 100
"""Tasks, each with some ten spans."""
LIMIT_S = 60.0
KEEP_S = 3600.0
COLLECT_MS = 5000
"""The default of OTEL_BSP_SCHEDULE_DELAY."""
PACKAGE = "opentelemetry.exporter.otlp.proto.http"


def is_installed() -> bool:
    """Whether this interpreter, which also sends, has the exporter; imports nothing of it."""
    try:
        return importlib.util.find_spec(PACKAGE) is not None
    except ModuleNotFoundError:
        return False


class Outgoing:
    """
    Args:
        environ: of the node, with its secrets.
        node_id: of this node.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str], node_id: str) -> None:
        self.webhooks = Webhooks(settings.notify, node_id)
        self.traces = spans.wanted(settings.otel, environ)
        if self.traces and not is_installed():
            self.traces = False
            logger.warning("no spans are sent: OpenTelemetry is not installed: {}", installed.install_command("otel"))
        self._otel = settings.otel
        self._environ = {name: value for name, value in environ.items() if name.startswith("OTEL_")}
        self._spans = Spans(node_id)

    def of_end(self, found: Found) -> Sequence[Sending]:
        """What is sent about a task's end; nothing where that cannot be built, as the task must end all the same."""
        try:
            return [*self.webhooks.of_end(found), *(self._spans.of_end(found) if self.traces else ())]
        except Exception as error:  # noqa: BLE001 - the boundary: a message must not cost a task its end
            logger.bind(task=found.entry.task_id).opt(exception=error).error("unhandled error in a notification")
            return []

    def lanes(self) -> list[Lane]:
        """Each receiver, and how it is sent to."""
        return [*self.webhooks.lanes(), *([self._collector()] if self.traces else [])]

    def _collector(self) -> Lane:
        file, node = self._otel.headers_file, self.webhooks.node
        about = Collector(
            endpoint=self._otel.endpoint,
            headers_file=None if file is None else str(secret_path(file)),
            node_id=node["node_id"],
            host=node["host"],
        )
        delay = self._environ.get("OTEL_BSP_SCHEDULE_DELAY", "")
        return Lane(
            name=spans.LANE,
            shown="OpenTelemetry",
            entry=ENTRY,
            receiver=lambda: msgspec.json.encode(about),
            limit_s=LIMIT_S,
            keep_s=KEEP_S,
            most=BATCH,
            collect_s=(int(delay) if delay.isdecimal() else COLLECT_MS) / 1000,
            env=self._environ,
        )
