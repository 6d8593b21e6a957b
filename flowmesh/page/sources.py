"""What the page knows of the node and of the deployment: asked at most once a second, however many look at it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from flowmesh.cli import locate
from flowmesh.cli.control import Control
from flowmesh.cli.top.fleet_source import FleetSource
from flowmesh.cli.top.node_source import LIMIT, NodeSource
from flowmesh.cli.top.picture import Picture
from flowmesh.errors import FlowMeshError
from flowmesh.messages.page import Note
from flowmesh.settings.schema import RedisSettings
from flowmesh.tasks.journal_db import JOURNAL_FILE

FRESH_S = 1.0
UNUSED_S = 30.0
"""After this time without a look at the fleet its connection is closed: Redis would keep events that nobody reads."""
T = TypeVar("T")


class Cached(Generic[T]):
    """The last answer of a function, or its error, for FRESH_S."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._at = -FRESH_S
        self._answer: T | FlowMeshError | None = None

    def __call__(self) -> T:
        """Raises FlowMeshError."""
        with self._lock:
            if time.monotonic() - self._at >= FRESH_S:
                try:
                    self._answer = self._ask()
                except FlowMeshError as error:
                    self._answer = error
                self._at = time.monotonic()
            if isinstance(self._answer, FlowMeshError):
                raise FlowMeshError(str(self._answer))
            return self._answer  # type: ignore[return-value]


class Sources:
    def __init__(self, note: Note, redis_url: str | None) -> None:
        self.state_dir = Path(note.state_dir)
        self.journal = self.state_dir / JOURNAL_FILE
        self._redis = RedisSettings(url=redis_url, password_file=note.redis_password_file)
        self._node = NodeSource(self.state_dir)
        self._fleet_source: FleetSource | None = None
        self._address = ""
        self._fleet_lock = threading.Lock()
        self._unused: threading.Timer | None = None
        self.status: Cached[dict[str, Any]] = Cached(self._ask_status)
        self.node: Cached[Picture] = Cached(lambda: self._node.picture(self.status()))
        self.metrics: Cached[str] = Cached(self._ask_metrics)
        self.fleet: Cached[Picture] = Cached(self._ask_fleet)

    @property
    def has_fleet(self) -> bool:
        return self._redis.url is not None

    def live(self, task_id: str) -> dict[str, Any] | None:
        """What the node says of a task that it has now."""
        try:
            tasks = self.status().get("tasks") or ()
        except FlowMeshError:
            return None
        return next((each for each in tasks if each.get("task_id") == task_id), None)

    def _ask_status(self) -> dict[str, Any]:
        with Control(self.state_dir) as control:
            return control.status_json(LIMIT)

    def _ask_metrics(self) -> str:
        with Control(self.state_dir) as control:
            return control.metrics()

    def _ask_fleet(self) -> Picture:
        with self._fleet_lock:
            address = locate.address_of(self._redis)
            if self._fleet_source is None or address != self._address:
                if self._fleet_source is not None:
                    self._fleet_source.close()
                self._fleet_source, self._address = FleetSource(address), address
            if self._unused is not None:
                self._unused.cancel()
            self._unused = threading.Timer(UNUSED_S, self._close_fleet)
            self._unused.daemon = True
            self._unused.start()
            return self._fleet_source.fetch()

    def _close_fleet(self) -> None:
        with self._fleet_lock:
            if self._fleet_source is not None:
                self._fleet_source.close()
