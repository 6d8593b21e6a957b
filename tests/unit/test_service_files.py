"""What starts a node again: after a crash, and neither after a drain nor where starting again does not help."""

from __future__ import annotations

import configparser

from flowmesh.errors import EXIT_CONFIG, EXIT_OK, EXIT_USAGE
from tests.kit.paths import CONF


def read(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes=("#", ";"))
    parser.read(CONF / name)
    return parser


def test_systemd_starts_a_node_again_unless_it_was_drained_or_its_file_is_wrong() -> None:
    service = read("flowmesh-supervisor.service")["Service"]
    assert service["Restart"] == "always", "on-failure takes SIGHUP, SIGINT, SIGTERM and SIGPIPE for a wanted end"
    assert service["RestartPreventExitStatus"].split() == [str(EXIT_OK), str(EXIT_USAGE), str(EXIT_CONFIG)]


def test_systemd_gives_up_neither_on_crashes_nor_before_a_reload_is_done() -> None:
    unit = read("flowmesh-supervisor.service")
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert unit["Service"]["Type"] == "notify-reload"
    assert "ExecReload" not in unit["Service"], "notify-reload sends SIGHUP itself"


def test_supervisord_does_the_same() -> None:
    program = read("supervisord.conf")["program:flowmesh"]
    assert program["autorestart"] == "unexpected"
    assert program["exitcodes"].split(",") == [str(EXIT_OK), str(EXIT_USAGE), str(EXIT_CONFIG)]
    assert int(program["startretries"]) > 1000, "a node that still runs makes each start end with 75 at once"
