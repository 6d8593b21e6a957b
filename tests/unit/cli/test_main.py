"""The command line's surface: what stands on it, how fast it answers, and how errors leave it."""

import subprocess
import sys

import click
import pytest

from flowmesh.cli.main import COMMANDS, cli, guarded, main
from flowmesh.errors import BusyError, ConfigError, FieldError, FlowMeshError, UnavailableError
from flowmesh.installed import version

SURFACE = {
    "run": (
        "FILES --config --embedded --engine --help --json --keep-going --model --read-root --results-dir "
        "--served-model-name --task-id --timeout -k"
    ),
    "submit": "FILES --anyway --config --help --json --no-check --nodes --priority --queue --redis --retries "
    "--task-id "
    "--timeout --wait --worker",
    "ps": "--all --config --help --json --redis",
    "wait": "TASK_IDS --config --help --json --redis --timeout",
    "result": "TASK_ID --config --help --json --redis",
    "queue": "--config --help --json --redis",
    "validate": "FILES --config --help --json --kind",
    "schema": "KIND --help",
    "workers": "--config --help --json --redis --watch",
    "status": "--config --help --json --state-dir",
    "history": "--config --help --json --limit --owner --since --state-dir --sum --type --verdict",
    "show": "TASK_ID --config --endpoint --help --json --state-dir",
    "replay": "TASK_ID --config --help --json --results-dir --secret --state-dir --until",
    "top": "--config --fleet --help --interval --json --once --redis --sort --state-dir",
    "metrics": "--config --help --state-dir",
    "notify": "--config --help --json --state-dir --test",
    "logs": "TASK_ID --config --follow --help --json --member --raw --redis --results-dir --state-dir "
    "--stderr --stdout -f -n",
    "exec": (
        "COMMAND --config --embedded --gpus --help --memory --output --preload --quiet --report --results-dir "
        "--timeout -q"
    ),
    "serve": "MODEL --config --dtype --embedded --engine --help --host --idle --json --name --port --revision --ttl",
    "scale": "--config --dry-run --help --interval --json --max --min --name --once --redis --script --slurm",
    "cancel": "TASK_ID --config --force --help --json --reason --redis --state-dir",
    "deliver": "TASK_ID --config --help --json --state-dir",
    "drain": "--cancel --config --help --json --mode --state-dir --wait",
    "init": "--dry-run --help --prefix --supervisord --systemd --user",
    "cost": "--by --config --help --json --kwh-price --since --state-dir",
    "loss": "TASK_ID --config --help --json --png --state-dir --svg",
    "completion": "SHELL --help",
    "examples": "--copy --help --json NAME",
    "doctor": "--config --help --json",
    "recycle": "ENVIRONMENT --config --help --json --state-dir",
    "upgrade": "--config --help --json --state-dir",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_surface_stays_as_it_is(name):
    context = click.Context(cli)
    command = cli.get_command(context, name)
    words = {
        word
        for parameter in command.get_params(click.Context(command))
        for word in (parameter.opts if isinstance(parameter, click.Option) else [parameter.name.upper()])
    }
    assert sorted(words - {"-h"}) == sorted(SURFACE[name].split())


def test_the_table_of_commands_says_what_the_commands_say(capsys):
    assert set(COMMANDS) == set(SURFACE)
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out and line in out for name, (_, line) in COMMANDS.items())


def loaded(*arguments):
    """The modules that a command line has imported when it ends."""
    script = (
        "import sys\nfrom flowmesh.cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('|'.join(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True).stdout
    return out.splitlines()[0], set(out.splitlines()[-1].split("|"))


@pytest.mark.parametrize("arguments", [("--version",), ("--help",)])
def test_the_quick_answers_import_nothing_slow(arguments):
    first, modules = loaded(*arguments)
    assert first == (
        f"flowmesh {version()}" if arguments == ("--version",) else "Usage: flowmesh [OPTIONS] COMMAND [ARGS]..."
    )
    assert (
        modules & {"redis", "rich", "yaml", "msgspec", "asyncio", "flowmesh.cli.run", "flowmesh.settings.load"} == set()
    )


def test_no_command_is_help_and_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["rum"])
    assert caught.value.code == 2
    assert "No such command 'rum'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FlowMeshError("a\n  b"), 1),
        (FieldError("a b", "a"), 1),
        (UnavailableError("a b"), 69),
        (BusyError("a b"), 75),
        (ConfigError("a b"), 78),
    ],
)
def test_an_error_is_one_line_and_its_code(error, code, capsys):
    def command():
        raise error

    assert guarded(command) == code
    assert capsys.readouterr() == ("", "flowmesh: a b\n")


def test_a_bug_is_not_hidden():
    def command():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(command)


def test_bad_files_end_before_anything_is_started(tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text("spec: [\n")
    for command in (["run"], ["submit", "--redis", "redis://127.0.0.1:1/0"]):
        with pytest.raises(SystemExit) as caught:
            main([*command, str(bad)])
        assert caught.value.code == 1
        assert capsys.readouterr().err.startswith(f"flowmesh: {bad}: line 2, column 1: ")
