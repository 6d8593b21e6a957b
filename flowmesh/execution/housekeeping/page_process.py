"""Keeps the process running that serves the node's page (`web.listen`). The node itself speaks no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

from flowmesh.backoff import Backoff
from flowmesh.errors import LaunchError
from flowmesh.execution.helper_fork import helper_fork
from flowmesh.execution.layout import OOM_SCORE_ADJ, Layout
from flowmesh.messages.page import FAULT, LISTENING, NOTE_FILE, Note
from flowmesh.processes.helper import Helpers
from flowmesh.processes.limits import Limits
from flowmesh.processes.pipe import Credentials, Frame, Phase
from flowmesh.processes.protocol import Fork
from flowmesh.results.safe_files import write_atomic
from flowmesh.settings.addresses import listen_address
from flowmesh.settings.schema import Settings
from flowmesh.settings.secret_files import secret_path
from flowmesh.tasks.catalogue import DELIVERY
from flowmesh.tasks.verdicts import describe_exit

ENTRY = "flowmesh.page.child:main"
FIRST_ATTEMPT = 3 << 50
"""Its attempt numbers are its own among the helpers'."""
STEADY_S = 60.0
"""One that ran for so long is started again at once."""
MEMORY_BYTES = 512 * 1024**2
"""Of its cgroup; without one the process limits its own heap."""
NICE = 10


class PageProcess:
    def __init__(self, settings: Settings, layout: Layout, helpers: Helpers) -> None:
        self._settings = settings
        self._layout = layout
        self._helpers = helpers
        self._attempt = FIRST_ATTEMPT + time.time_ns() // 1_000_000
        self._state = "starting"
        self._fault = ""
        """Why it does not serve; empty: it does, or has only just been started."""
        self._logged = ""

    def works(self) -> list[Coroutine[Any, Any, None]]:
        """What runs from the recovery on; nothing without a page."""
        return [] if self._settings.web.listen is None else [self._run()]

    def summary(self) -> dict[str, Any] | None:
        """For `flowmesh status`; None: there is no page."""
        listen = self._settings.web.listen
        return None if listen is None else {"listen": listen, "state": self._state, "error": self._fault or None}

    async def _run(self) -> None:
        """Until cancelled, which ends it."""
        backoff = Backoff(0.5, 30.0)
        while True:
            began = time.monotonic()
            self._attempt += 1
            told = ""

            def on_frame(frame: Frame) -> None:
                nonlocal told
                if isinstance(frame, Phase) and frame.name.startswith(FAULT):
                    told = frame.name.removeprefix(FAULT)
                elif isinstance(frame, Phase) and frame.name == LISTENING:
                    self._listens()

            try:
                await asyncio.to_thread(self._prepare)
                greeting = Credentials(redis_url=self._settings.redis.url)
                fork = self._fork(self._attempt)
                exit_ = await self._helpers.run(DELIVERY, fork, greeting=greeting, on_frame=on_frame)
                why = told or f"its process ended ({describe_exit(exit_)})"
            except (LaunchError, OSError) as error:
                why = str(error)
            if time.monotonic() - began > STEADY_S:
                backoff.reset()
            self._fails(why)
            await asyncio.sleep(backoff.next_s())

    def _listens(self) -> None:
        self._state, self._fault = "listening", ""
        if self._logged != LISTENING:
            logger.info("the page is at http://{}/", self._settings.web.listen)
        self._logged = LISTENING

    def _fails(self, why: str) -> None:
        self._state, self._fault = "failed", why
        if why != self._logged:
            logger.warning("no page at {}: {}; it is tried again, and the node goes on", self._settings.web.listen, why)
        self._logged = why

    def _folder(self) -> Path:
        return self._layout.state_dir / "run" / "page"

    def _prepare(self) -> None:
        """Runs in a thread."""
        web = self._settings.web
        place = listen_address(web.listen or "")
        assert place is not None  # checked with the settings
        self._folder().mkdir(mode=0o700, exist_ok=True)
        password_file = self._settings.redis.password_file
        note = Note(
            state_dir=str(self._layout.state_dir),
            host=place[0],
            port=place[1],
            token_file=None if web.token_file is None else str(secret_path(web.token_file)),
            hosts=web.hosts,
            redis_password_file=None if password_file is None else str(secret_path(password_file)),
        )
        write_atomic(self._folder() / NOTE_FILE, msgspec.json.encode(note), private=True)

    def _fork(self, attempt: int) -> Fork:
        limits = Limits(memory_max_bytes=MEMORY_BYTES, nice=NICE, oom_score_adj=OOM_SCORE_ADJ)
        return helper_fork(self._layout, attempt, ENTRY, self._folder(), "page.log", limits=limits)
