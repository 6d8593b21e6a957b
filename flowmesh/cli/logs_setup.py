"""Configures the supervisor's log: plain lines on stderr, JSON lines in the file if one is set. Call before forking."""

from __future__ import annotations

import atexit
import os
import re
import sys
from typing import TYPE_CHECKING

from loguru import logger

from flowmesh.messages.text import escaped
from flowmesh.redaction import Redactor
from flowmesh.settings.paths import log_file
from flowmesh.settings.schema import Settings
from flowmesh.startup.log_writer import FileWriter, LogWriter
from flowmesh.startup.old_variables import logs_to_stdout

if TYPE_CHECKING:
    from loguru import Message, Record

ROTATION = "64 MB"
KEPT = 5
LAST_LINES_S = 2.0
"""How long a node that ends waits for whoever reads its log."""

_COLOUR_OR_LINE = re.compile(r"(\x1b\[[0-9;]*m|\n)")


def configure(settings: Settings, redact: Redactor) -> None:
    """Set up the log. Its file must be writable: see `folders.make_log_file`.

    What else is printed on standard error goes the same way, so that nothing waits for its reader.

    Args:
        redact: hides secrets in messages, their fields and the exceptions with them.
    """
    stream = sys.stdout if logs_to_stdout(os.environ) else sys.stderr
    colours = stream.isatty()
    sys.stderr = writer = LogWriter(stream.fileno())
    atexit.register(writer.drain, LAST_LINES_S)

    def write(line: Message) -> None:
        writer.write(_harmless(line, colours=colours))

    def outgoing(record: Record) -> None:
        _hide(record, redact)
        _escape(record)

    logger.remove()
    path = log_file(settings)
    if path is not None:
        literal = str(path).replace("{", "{{").replace("}", "}}")  # loguru would expand {time} in the path
        file = FileWriter(literal, rotation=ROTATION, kept=KEPT)
        atexit.register(file.drain, LAST_LINES_S)
    logger.configure(patcher=outgoing)
    level = str(settings.node.log_level)
    logger.add(write, level=level, format=_line, diagnose=False, colorize=colours)
    if path is not None:
        logger.add(file.write, level=level, serialize=True, diagnose=False)


def _escape(record: Record) -> None:
    """Messages and fields quote tasks and peers: their control characters are written out."""
    record["message"] = escaped(record["message"])
    for name, value in record["extra"].items():
        if isinstance(value, str):
            record["extra"][name] = escaped(value)


def _harmless(line: str, *, colours: bool) -> str:
    """The same for tracebacks, whose line breaks, and the log's own colours, stay."""
    if line.isascii() and line.isprintable():
        return line
    own = _COLOUR_OR_LINE if colours else re.compile(r"(\n)")
    return "".join(part if own.fullmatch(part) else escaped(part) for part in own.split(line))


def _hide(record: Record, redact: Redactor) -> None:
    record["message"] = redact(record["message"])
    record["extra"].update(redact.deep(record["extra"]))
    if (raised := record["exception"]) is not None and (text := redact(str(raised.value))) != str(raised.value):
        record["exception"] = raised._replace(value=Exception(text))  # without its causes, which say the same


def _line(record: Record) -> str:
    """Time, level, event, then its fields as name=value. Under systemd without the time, which journald adds."""
    fields = "".join(f" {name}={{extra[{name}]}}" for name, value in record["extra"].items() if value not in ("", None))
    when = "" if "JOURNAL_STREAM" in os.environ else "{time:YYYY-MM-DD HH:mm:ss.SSS} "
    return f"{when}<level>{{level: <8}}</level> {{message}}<dim>{fields}</dim>\n{{exception}}"
