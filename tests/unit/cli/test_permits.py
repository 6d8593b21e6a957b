"""`flowmesh run`: documents are the user's own. Their folders and their models' code are open; settings still count."""

from __future__ import annotations

from pathlib import Path

from flowmesh.cli.local import LocalNode, LocalOptions
from flowmesh.settings.load import load


def permits(options: LocalOptions) -> dict[str, str]:
    return LocalNode(options).permits()


def test_own_documents_may_bring_code_and_use_loopback(tmp_path: Path) -> None:
    found = permits(LocalOptions(read_roots=(str(tmp_path / "a,b[1]"),)))
    settings = load(None, {}, found).settings.tasks
    assert settings.trust_remote_code == ("*",)
    assert settings.local_hosts == ("*",)
    assert settings.api_keys == ("*@*",)
    assert settings.allow_command == settings.allow_env == ("*",)
    assert settings.allow_serve == ("127.0.0.1", "::1")
    assert load(None, {}, found).settings.cloud.write == ("s3://*",)
    assert settings.read_roots == (f"{tmp_path}/a?b[[]1]",)  # a list's items are separated by commas


def test_the_settings_of_a_file_count(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text(
        '[tasks]\nread_roots = ["/models"]\ntrust_remote_code = ["owner/*"]\nlocal_hosts = ["h:1"]\n'
        'api_keys = ["K@h"]\nallow_command = ["/opt/*"]\nallow_env = ["MY_*"]\nallow_serve = ["::1"]\n'
        '[cloud]\nread = ["s3://data"]\nwrite = ["s3://out"]\n'
        'credentials_file = "/etc/s3"\n'
    )
    found = permits(LocalOptions(config=str(tmp_path / "node.toml"), read_roots=("/project",)))
    assert found == {"tasks.read_roots": "/models,/project"}
