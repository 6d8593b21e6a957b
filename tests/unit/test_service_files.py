"""What starts a node again: after a crash, and neither after a drain nor where starting again does not help."""

from __future__ import annotations

import configparser

from flowmesh.errors import EXIT_CONFIG, EXIT_OK, EXIT_USAGE
from tests.kit.paths import CONF


def read(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes=("#", ";"))
    parser.read(CONF / name)
    return parser


def test_systemd_leaves_a_drained_node_and_a_wrong_file_alone() -> None:
    service = read("flowmesh-supervisor.service")["Service"]
    assert service["Restart"] == "on-failure", "so an end with 0 is left alone; always would start it anew"
    assert service["RestartPreventExitStatus"].split() == [str(EXIT_USAGE), str(EXIT_CONFIG)]


def test_supervisord_does_the_same() -> None:
    program = read("supervisord.conf")["program:flowmesh"]
    assert program["autorestart"] == "unexpected"
    assert program["exitcodes"].split(",") == [str(EXIT_OK), str(EXIT_USAGE), str(EXIT_CONFIG)]
