"""`web.listen`: only loopback without a token."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowmesh.errors import ConfigError
from flowmesh.settings.load import load


def settings(tmp_path: Path, web: str) -> str | None:
    path = tmp_path / "node.toml"
    path.write_text(f"[web]\n{web}\n")
    return load(path, {}).settings.web.listen


@pytest.mark.parametrize("listen", ["127.0.0.1:9470", "localhost:1", "[::1]:9470", "127.1.2.3:65535"])
def test_loopback_needs_no_token(tmp_path: Path, listen: str) -> None:
    assert settings(tmp_path, f'listen = "{listen}"') == listen


@pytest.mark.parametrize("listen", ["0.0.0.0:9470", "[::]:9470", "10.0.0.1:9470", "node.example:80"])
def test_every_other_address_needs_one(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match=r"web\.listen: .* is not a loopback address: set web\.token_file"):
        settings(tmp_path, f'listen = "{listen}"')
    assert settings(tmp_path, f'listen = "{listen}"\ntoken_file = "/etc/token"') == listen


@pytest.mark.parametrize(
    "listen", ["9470", ":9470", "::1:9470", "[::1]", "127.0.0.1:0", "127.0.0.1:99999", "http://a:1", "[a]:1"]
)
def test_what_is_no_address_is_refused(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match=r"web\.listen: expected HOST:PORT"):
        settings(tmp_path, f'listen = "{listen}"')
