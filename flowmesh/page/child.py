"""The entry of the process that serves the page. It is forked like a delivery, and ends with the node."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import time
from pathlib import Path

from flowmesh import installed
from flowmesh.errors import ConfigError
from flowmesh.messages.page import FAULT, LISTENING, NOTE_FILE, Note
from flowmesh.processes.pipe import Phase, Pipe
from flowmesh.results.child import credentials_of
from flowmesh.results.safe_files import read_note

HEAP_BYTES = 1024**3
"""For where there is no cgroup."""
BIND_S = 1.5
"""How long an earlier page may take to give its port back."""
CONNECTIONS = 64
HEADER_BYTES = 16 * 1024
BACKLOG = 64
IDLE_S = 15

log = logging.getLogger("flowmesh.page")


def main(pipe: Pipe, folder: Path) -> int:
    """Serve until killed."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True)
    os.umask(0o077)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (HEAP_BYTES, HEAP_BYTES))
    note = read_note(folder / NOTE_FILE, Note)
    if note is None:
        return _fails(pipe, f"{folder / NOTE_FILE} cannot be read")
    redis_url = credentials_of(pipe).redis_url
    try:
        import uvicorn

        from flowmesh.page.app import make_app
        from flowmesh.page.tokens import Tokens
    except ImportError as error:
        return _fails(pipe, f"{error.name or error} is not installed; {installed.install_command('web')}")
    tokens = Tokens(note.token_file)
    try:
        tokens.current()
        listener = _listen(note)
    except ConfigError as error:
        return _fails(pipe, str(error))
    config = uvicorn.Config(
        make_app(note, redis_url, tokens),
        access_log=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        http="h11",
        lifespan="off",
        limit_concurrency=CONNECTIONS,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=IDLE_S,
        ws="none",
    )
    pipe.send(Phase(LISTENING), drop=True)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _fails(pipe: Pipe, why: str) -> int:
    log.error("%s", why)
    pipe.send(Phase(FAULT + why), drop=True)
    return 1


def _listen(note: Note) -> socket.socket:
    """Raises ConfigError."""
    where = f"[{note.host}]:{note.port}" if ":" in note.host else f"{note.host}:{note.port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(note.host, note.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"web.listen: {note.host} is unknown ({error.strerror}); give an address") from None
    deadline = time.monotonic() + BIND_S
    while True:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            raise ConfigError(f"web.listen: {where}: {error.strerror}; choose a free port") from None
        return listener
