"""The supervisor's log: plain lines on stderr, JSON lines in the file where one is set. Configured before any fork."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from loguru import logger

from flowmesh.settings_paths import log_file
from flowmesh.settings_schema import Settings

if TYPE_CHECKING:
    from loguru import Record

ROTATION = "64 MB"
KEPT = 5


def configure(settings: Settings) -> None:
    """The file must be one that can be written: see `folders.make_log_file`."""
    logger.remove()
    level = str(settings.node.log_level)
    logger.add(sys.stderr, level=level, format=_line, diagnose=False, colorize=sys.stderr.isatty())
    path = log_file(settings)
    if path is not None:
        literal = str(path).replace("{", "{{").replace("}", "}}")  # loguru fills in what braces name
        logger.add(literal, level=level, serialize=True, diagnose=False, rotation=ROTATION, retention=KEPT)


def _line(record: Record) -> str:
    """Time, level, event, then its fields as name=value; without the time under systemd, which has its own."""
    fields = "".join(f" {name}={{extra[{name}]}}" for name, value in record["extra"].items() if value not in ("", None))
    when = "" if "JOURNAL_STREAM" in os.environ else "{time:YYYY-MM-DD HH:mm:ss.SSS} "
    return f"{when}<level>{{level: <8}}</level> {{message}}<dim>{fields}</dim>\n{{exception}}"
