"""A task on a node of this machine: hands it over, and forwards its events, also while the node restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmesh.cli.control import Control
from flowmesh.cli.control_types import Ended, Seen, Taken
from flowmesh.errors import FlowMeshError, UnavailableError

GONE_AFTER_S = 10.0
"""A node that restarts closes its connections, and answers again within seconds."""
_RETRY_S = 0.1

Put = Callable[[Seen | FlowMeshError], None]


class NodeWatch:
    """A task that was handed to a node. `close` it.

    Args:
        put: called in a thread with each event, and at last with `Ended` or the error by which the node was lost.
        check: raises FlowMeshError where the node is known to be gone.

    Raises:
        Refused: it fits no worker of the node, or the node takes no task now.
        UnavailableError: the node is gone.
    """

    def __init__(
        self,
        state_dir: Path,
        task_id: str,
        document: dict[str, Any],
        put: Put,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._state_dir = state_dir
        self._task_id = task_id
        self._put = put
        self._check = check
        self._closed = False
        self._thread: threading.Thread | None = None
        self._control = self._connect()
        try:
            self.taken: Taken = self._control.submit(task_id, document, watch=True)
        except FlowMeshError:
            self._control.close()
            raise
        if self.taken.refused is not None:
            self._control.close()
            put(Ended(ok=False, verdict=self.taken.verdict, error=self.taken.refused))
            return
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more. The task goes on."""
        self._closed = True
        if self._thread is not None:
            self._control.interrupt()
            self._thread.join()

    def cancel(self, *, force: bool) -> None:
        try:
            with Control(self._state_dir) as control:
                control.cancel(self._task_id, force=force)
        except FlowMeshError:
            return  # it has ended meanwhile, or the watch tells that the node is gone

    def _connect(self) -> Control:
        deadline = time.monotonic() + GONE_AFTER_S
        while True:
            self._check()
            try:
                return Control(self._state_dir)
            except UnavailableError:
                if self._closed or time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_S)

    def _forward(self) -> None:
        try:
            events = self._control.watched()
            while True:
                try:
                    with self._control:
                        for event in events:
                            self._put(event)
                    return
                except UnavailableError:
                    if self._closed:
                        return
                self._control = self._connect()
                events = self._control.watch(self._task_id)
        except FlowMeshError as error:
            self._put(error)
