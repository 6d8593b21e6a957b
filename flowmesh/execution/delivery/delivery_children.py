"""The children that archive, hash and upload results. How many run at once is bounded.

A delivery child is forked by a fork server of its own kind, under the attempt's negative number.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from loguru import logger

from flowmesh.errors import ConfigError
from flowmesh.execution.delivery.places import Places
from flowmesh.execution.helper_fork import helper_fork
from flowmesh.execution.layout import Layout
from flowmesh.messages.job import Exit
from flowmesh.processes import environ
from flowmesh.processes.helper import Helpers, OnFrame
from flowmesh.processes.limits import Limits
from flowmesh.processes.pipe import Credentials
from flowmesh.processes.protocol import Fork
from flowmesh.results.s3_access import keys_of
from flowmesh.settings.schema import Settings
from flowmesh.settings.secret_files import orchestrator_token
from flowmesh.tasks.catalogue import DELIVERY

ENTRY = "flowmesh.results.child:main"


class DeliveryChildren:
    def __init__(self, settings: Settings, layout: Layout, helpers: Helpers) -> None:
        self.places = Places(settings.delivery.concurrency)
        """One is held for each child; taken by the caller, who may have to give up waiting."""
        self._settings = settings
        self._layout = layout
        self._helpers = helpers
        self._token_trouble = ""
        """Why the token could not be read last time."""

    async def run(self, attempt: int, greeting: Credentials, on_frame: OnFrame | None = None) -> Exit:
        """Do the delivery job in the attempt's spool folder.

        Args:
            greeting: from `greeting`.

        Raises:
            LaunchError: there is no child; HelperLost: its fork server died.
        """
        return await self._helpers.run(DELIVERY, self._fork(attempt), greeting=greeting, on_frame=on_frame)

    def resume(self, attempt: int, on_frame: OnFrame | None = None) -> Coroutine[Any, Any, Exit]:
        """Take over a delivery child that an earlier supervisor started; returns what waits for its end."""
        return self._helpers.resume(-attempt, greeting=self.greeting(), on_frame=on_frame)

    def kill(self, attempt: int) -> None:
        self._helpers.kill(-attempt)

    def greeting(self) -> Credentials:
        """The token as it is now: it may be in a file that changes. Reads that file."""
        keys = keys_of(self._settings.cloud)
        try:
            greeting, trouble = Credentials(orchestrator_token(self._settings.delivery), keys), ""
        except ConfigError as error:
            greeting, trouble = Credentials(None, keys), str(error)
        if trouble and trouble != self._token_trouble:
            logger.warning("deliveries have no token: {}", trouble)
        self._token_trouble = trouble
        return greeting

    def _fork(self, attempt: int) -> Fork:
        layout, role = self._layout, environ.of_role(self._settings.cloud.role)
        limits = Limits(umask=layout.umask)
        return helper_fork(layout, -attempt, ENTRY, layout.spool(attempt), "delivery.log", env=role, limits=limits)
