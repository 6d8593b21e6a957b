"""How commands end: exit codes, one line for an error, and a reader that closes the pipe."""

from __future__ import annotations

import signal
import subprocess
import sys

import click
import pytest

from flowmesh import errors
from flowmesh.cli.guard import guarded
from flowmesh.cli.signals import Interrupted
from flowmesh.cli.supervisor import main as supervisor


def test_each_exit_code_means_one_thing() -> None:
    codes = {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert len(set(codes.values())) == len(codes)
    assert codes["EXIT_INTERRUPTED"] == codes["EXIT_BY_SIGNAL"] + signal.SIGINT
    assert Interrupted(signal.SIGTERM, "x").exit_code == errors.EXIT_BY_SIGNAL + signal.SIGTERM


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), errors.EXIT_INTERRUPTED, "node: interrupted\n"),
        (click.Abort(), errors.EXIT_INTERRUPTED, "node: interrupted\n"),
        (errors.BusyError("a\n b"), errors.EXIT_TRY_AGAIN, "node: a b\n"),
    ],
)
def test_the_line_starts_with_the_program(error: BaseException, code: int, text: str, capsys) -> None:
    def command() -> None:
        raise error

    assert guarded(command, "node") == code
    assert capsys.readouterr() == ("", text)


def test_a_broken_pipe_of_a_node_is_a_bug_that_shows() -> None:
    def command() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        guarded(command)


def test_the_supervisor_ends_with_the_same_codes(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["flowmesh-supervisor", "--check", "--set", "redis.timeout_s=never"])
    assert supervisor() == errors.EXIT_CONFIG
    assert capsys.readouterr().err.startswith("flowmesh-supervisor: command line: redis.timeout_s: expected a number")
    monkeypatch.setattr(sys, "argv", ["flowmesh-supervisor", "--set", "redis.timeout_s"])
    assert supervisor() == errors.EXIT_USAGE
    assert "--set: expected KEY=VALUE, such as redis.timeout_s=10" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_traceback() -> None:
    script = (
        "import sys\nfrom flowmesh.cli.guard import guarded, piped\n"
        "sys.exit(guarded(lambda: piped(lambda: [print('line ' * 20) for _ in range(100_000)])))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == errors.EXIT_FAILURE
