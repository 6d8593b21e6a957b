"""Keeps the gateway running from the first task that may need it: the child that fetches with the node's
credentials."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from loguru import logger

from flowmesh.backoff import Backoff
from flowmesh.errors import ConfigError, LaunchError
from flowmesh.execution.helper_fork import helper_fork
from flowmesh.execution.layout import Layout
from flowmesh.processes import environ
from flowmesh.processes.helper import HelperLost, Helpers
from flowmesh.processes.pipe import Credentials
from flowmesh.processes.protocol import Fork
from flowmesh.results.gateway_note import NOTE_FILE, Note
from flowmesh.results.s3_access import access_of, keys_of
from flowmesh.results.safe_files import write_atomic
from flowmesh.settings.schema import Settings
from flowmesh.settings.secret_files import secret_path
from flowmesh.tasks.catalogue import DELIVERY
from flowmesh.tasks.verdicts import describe_exit

ENTRY = "flowmesh.results.gateway:main"
FIRST_ATTEMPT = 1 << 50
"""Its attempt numbers are far above those of tasks and canaries."""
STEADY_S = 60.0
"""One that ran for so long is started again at once."""


class GatewayProcess:
    """
    Args:
        on_broken: told why no gateway can be started.
    """

    def __init__(self, settings: Settings, layout: Layout, helpers: Helpers, on_broken: Callable[[str], None]) -> None:
        self._on_broken = on_broken
        self._settings = settings
        self._layout = layout
        self._helpers = helpers
        self._attempt = FIRST_ATTEMPT + time.time_ns() // 1_000_000
        self._running: asyncio.Task[None] | None = None

    def need(self) -> None:
        """A task starts, or was adopted, that may download something."""
        if self._layout.gateway is not None and self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End it; the node ends."""
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
            self._running = None

    async def _run(self) -> None:
        backoff = Backoff(0.5, 30.0)
        while True:
            began = time.monotonic()
            self._attempt += 1
            try:
                greeting = await asyncio.to_thread(self._prepare)
                exit_ = await self._helpers.run(DELIVERY, self._fork(self._attempt), greeting=greeting)
                why = describe_exit(exit_)
            except (LaunchError, ConfigError, OSError) as error:
                why = str(error)
                if isinstance(error, LaunchError) and not isinstance(error, HelperLost):
                    self._on_broken(why)
            if time.monotonic() - began > STEADY_S:
                backoff.reset()
            wait_s = backoff.next_s()
            logger.warning("the gateway for downloads ended ({}); started again in {:.1f} s", why, wait_s)
            await asyncio.sleep(wait_s)

    def _prepare(self) -> Credentials:
        layout, settings, cloud = self._layout, self._settings.delivery, self._settings.cloud
        assert layout.gateway is not None
        folder = Path(layout.gateway.socket).parent
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700 if layout.owner is None else 0o711)
        file = settings.orchestrator_token_file
        note = Note(
            socket=layout.gateway.socket,
            key=layout.gateway.key,
            orchestrator_url=settings.orchestrator_url if layout.gateway.token else None,
            s3=access_of(cloud) if layout.gateway.s3 else None,
            token_file=None if file is None else str(secret_path(file)),
            mode=0o600 if layout.owner is None else 0o666,
        )
        write_atomic(folder / NOTE_FILE, msgspec.json.encode(note), private=True)
        return Credentials(settings.orchestrator_token, keys_of(cloud))

    def _fork(self, attempt: int) -> Fork:
        assert self._layout.gateway is not None
        folder = Path(self._layout.gateway.socket).parent
        role = environ.of_role(self._settings.cloud.role)
        return helper_fork(self._layout, attempt, ENTRY, folder, "gateway.log", env=role)
