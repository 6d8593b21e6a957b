"""What `flowmesh doctor` finds about the page of `web.listen`."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator

from flowmesh import installed
from flowmesh.cli.control_types import PageStatus
from flowmesh.cli.findings import Finding, Level
from flowmesh.errors import ConfigError
from flowmesh.settings.addresses import listen_address
from flowmesh.settings.schema import Settings
from flowmesh.settings.secret_files import read_secret, secret_path

AREA = "page"
_LIBRARIES = ("starlette", "uvicorn", "jinja2")


def check(settings: Settings, running: PageStatus | None) -> Iterator[Finding]:
    """Whether the page can be served; nothing where none is wanted.

    Args:
        running: what the node says of its page; None: no node runs, or it has none.
    """
    web = settings.web
    if web.listen is None:
        return
    if missing := [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]:
        yield Finding(AREA, Level.BROKEN, f"{missing[0]} is not installed", installed.install_command("web"))
        return
    if web.token_file is not None:
        try:
            read_secret(web.token_file, "web.token_file")
        except ConfigError as error:
            yield Finding(AREA, Level.BROKEN, str(error), "write a token into it: openssl rand -hex 32")
            return
        if (path := secret_path(web.token_file)).stat().st_mode & 0o077:
            yield Finding(AREA, Level.WARN, f"{path} can be read by others", f"chmod 600 {path}")
    if running is not None and running.listen == web.listen:
        if running.error:
            yield Finding(AREA, Level.BROKEN, running.error, "the log page.log in the node's state_dir has more")
        else:
            yield Finding(AREA, Level.OK, f"http://{web.listen}/: {running.state}")
        return
    if (why := _in_use(web.listen)) is not None:
        yield Finding(AREA, Level.BROKEN, f"web.listen: {web.listen}: {why}", "choose a free port of this machine")
    else:
        yield Finding(AREA, Level.OK, f"{web.listen} is free")


def _in_use(listen: str) -> str | None:
    place = listen_address(listen)
    if place is None:  # a fault of the settings
        return None
    try:
        family, _, _, _, address = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None
