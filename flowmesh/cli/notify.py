"""`flowmesh notify`: the receivers of the node's notifications; with `--test`, sends each one a message now."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import click
import msgspec

from flowmesh import installed
from flowmesh.cli import locate, render
from flowmesh.cli.control import Control
from flowmesh.cli.control_types import ReceiverStatus
from flowmesh.cli.findings import Finding, Level
from flowmesh.cli.render import Column
from flowmesh.errors import EXIT_FAILURE, EXIT_OK, ConfigError
from flowmesh.redaction import redact_url
from flowmesh.reporting import spans, webhook_message, webhook_request
from flowmesh.reporting.outgoing import is_installed
from flowmesh.reporting.span_child import read_headers
from flowmesh.settings.schema import NotifySettings, Settings
from flowmesh.settings.secret_files import secret_path
from flowmesh.web.origins import is_loopback

AREA = "notifications"
CONNECT_S = 3.0
_RECEIVERS = (
    Column("RECEIVER", least=20),
    Column("WAITING"),
    Column("SENT"),
    Column("DROPPED", drop=1),
    Column("ERROR", least=10),
)


@click.command(
    help="Show where this node's notifications go (notify.url), what waits and the last error. "
    "With --test, send a message to each receiver now; exits with 1 if one does not take it."
)
@click.option("--test", is_flag=True, help="Send a test message; needs no running node.")
@locate.node_options
def notify(test: bool, config: str | None, state_dir: str | None, as_json: bool) -> int:
    """Run the command; returns the exit code."""
    if test:
        return _test(locate.settings(config).notify, as_json=as_json)
    with Control(locate.state_dir(state_dir, config)) as control:
        receivers = control.status().notify
    if as_json:
        render.print_json({"receivers": msgspec.to_builtins(receivers)})
    elif receivers:
        render.table(_RECEIVERS, [_row(each) for each in receivers])
    else:
        print("no receivers: set notify.url")
    return EXIT_OK


def troubles(receivers: tuple[ReceiverStatus, ...]) -> Iterator[str]:
    """One line for each receiver that does not work, or has lost messages; for `flowmesh status`."""
    for each in receivers:
        if each.error:
            yield f"notifications to {each.to}: {each.waiting} wait: {render.printable(each.error)}"
        elif each.dropped:
            yield f"notifications to {each.to}: {each.dropped} dropped unsent"


def check(settings: Settings) -> Iterator[Finding]:
    """For `flowmesh doctor`: whether messages can be signed and receivers be reached. Sends nothing."""
    yield from _spans(settings)
    notify = settings.notify
    if not notify.url:
        return
    if notify.secret_file is None:
        text = "not signed: receivers cannot tell who sent them"
        yield Finding(AREA, Level.NOTE, text, "set notify.secret_file, unless the receiver is a chat")
    else:
        yield _key(notify.secret_file)
    for url, shown in zip(notify.url, dict(notify.__rich_repr__())["url"], strict=True):
        yield _reached(url, shown)


def _spans(settings: Settings) -> Iterator[Finding]:
    if not spans.wanted(settings.otel, os.environ):
        return
    if not is_installed():
        text = "OpenTelemetry is not installed: no spans are sent"
        yield Finding("traces", Level.BROKEN, text, installed.install_command("otel"))
        return
    if settings.otel.headers_file is not None:
        try:
            read_headers(str(secret_path(settings.otel.headers_file)))
        except ConfigError as error:
            yield Finding("traces", Level.BROKEN, str(error), "write one `Name: value` a line into it")
            return
    where = next((os.environ[name] for name in spans.ENDPOINTS if os.environ.get(name)), "")
    url = settings.otel.endpoint or where
    yield msgspec.structs.replace(_reached(url, redact_url(url), setting="otel.endpoint"), area="traces")


def _key(file: str) -> Finding:
    try:
        webhook_request.read_key(str(secret_path(file)))
    except ConfigError as error:
        return Finding(AREA, Level.BROKEN, str(error), "write a secret into it: openssl rand -hex 32")
    path = secret_path(file)
    if path.stat().st_mode & 0o077:
        return Finding(AREA, Level.WARN, f"{path} can be read by others", f"chmod 600 {path}")
    return Finding(AREA, Level.OK, "signed")


def _reached(url: str, shown: str, *, setting: str = "notify.url") -> Finding:
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    test = "; flowmesh notify --test sends a message" if setting == "notify.url" else ""
    if any(os.environ.get(name) for name in (f"{parts.scheme}_proxy", f"{parts.scheme}_proxy".upper())):
        return Finding(AREA, Level.OK, f"{shown}: through a proxy, not checked{test}")
    try:
        with contextlib.closing(socket.create_connection((host, parts.port or (443 if secure else 80)), CONNECT_S)):
            pass
    except OSError as error:
        why = error.strerror or f"no answer within {CONNECT_S:g} s"
        return Finding(AREA, Level.BROKEN, f"{shown}: {why}", "start it, or correct {setting}")
    if not secure and not is_loopback(host):
        return Finding(AREA, Level.WARN, f"{shown}: not encrypted", "use https://")
    return Finding(AREA, Level.OK, f"{shown}: accepts connections{test}")


def _test(settings: NotifySettings, *, as_json: bool) -> int:
    if not settings.url:
        raise ConfigError("notify.url: not set; give the node's file with --config")
    body = webhook_message.of_test({"host": socket.gethostname()})
    shown = dict(settings.__rich_repr__())["url"]
    file = None if settings.secret_file is None else str(secret_path(settings.secret_file))
    found = []
    for url, to in zip(settings.url, shown, strict=True):
        answer = webhook_request.send(
            url,
            f"msg_{secrets.token_hex(16)}",
            webhook_message.rendered(body, settings.format),
            secret_file=file,
            timeout_s=settings.timeout_s,
        )
        found.append((to, answer.error))
        if not as_json:
            print(f"{to}: {render.printable(answer.error) or 'delivered'}")
    if as_json:
        render.print_json({"receivers": [{"to": to, "error": error or None} for to, error in found]})
    return EXIT_FAILURE if any(error for _, error in found) else EXIT_OK


def _row(each: ReceiverStatus) -> list[str]:
    return [each.to, str(each.waiting), str(each.sent), str(each.dropped), render.printable(each.error or "")]
