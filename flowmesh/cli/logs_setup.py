"""Configures the supervisor's log: plain lines on stderr, JSON lines in the file if one is set. Call before forking."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from loguru import logger

from flowmesh.redaction import Redactor
from flowmesh.settings.paths import log_file
from flowmesh.settings.schema import Settings

if TYPE_CHECKING:
    from loguru import Record

ROTATION = "64 MB"
KEPT = 5


def configure(settings: Settings, redact: Redactor) -> None:
    """Set up the log. Its file must be writable: see `folders.make_log_file`.

    Args:
        redact: hides secrets in messages, their fields and the exceptions with them.
    """
    logger.remove()
    logger.configure(patcher=lambda record: _hide(record, redact))
    level = str(settings.node.log_level)
    logger.add(sys.stderr, level=level, format=_line, diagnose=False, colorize=sys.stderr.isatty())
    path = log_file(settings)
    if path is not None:
        literal = str(path).replace("{", "{{").replace("}", "}}")  # loguru would expand {time} in the path
        logger.add(literal, level=level, serialize=True, diagnose=False, rotation=ROTATION, retention=KEPT)


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
