"""Secrets that lie in files and may change while the node runs: read at each use."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flowmesh.errors import ConfigError
from flowmesh.settings.schema import DeliverySettings

MAX_BYTES = 64 * 1024
CREDENTIALS = "$CREDENTIALS_DIRECTORY"
"""systemd's folder of a unit's credentials, as the beginning of a path."""


def secret_path(path: str) -> Path:
    """The path of a secret's file: `~`, and $CREDENTIALS_DIRECTORY at its beginning, are replaced."""
    if path == CREDENTIALS or path.startswith(f"{CREDENTIALS}/"):
        path = os.environ.get(CREDENTIALS[1:], CREDENTIALS) + path.removeprefix(CREDENTIALS)
    return Path(path).expanduser()


def read_secret(path: str, key: str) -> str:
    """The secret in a file, without white space around it.

    Args:
        key: the setting that names the file, for errors.

    Raises:
        ConfigError: it cannot be read, or contains no secret. Never shows the content.
    """
    place = secret_path(path)
    try:
        with place.open("rb") as file:
            secret = file.read(MAX_BYTES).decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{key}: {place} is not UTF-8 text; it must contain the secret and nothing else") from None
    except OSError as error:
        hint = ""
        if str(place).startswith(CREDENTIALS):
            hint = " (the node has no CREDENTIALS_DIRECTORY: systemd sets it for a unit with LoadCredential=)"
        raise ConfigError(f"{key}: {place} cannot be read: {(error.strerror or 'unknown').lower()}{hint}") from None
    if not secret:
        raise ConfigError(f"{key}: {place} is empty; it must contain the secret")
    return secret


def has_token(settings: DeliverySettings) -> bool:
    """Whether the settings give the node a token, readable now or not."""
    return settings.orchestrator_token is not None or settings.orchestrator_token_file is not None


def orchestrator_token(settings: DeliverySettings) -> str | None:
    """The token as it is now; None where the settings give none.

    Raises:
        ConfigError: its file cannot be read, or contains no token.
    """
    if settings.orchestrator_token_file is None:
        return settings.orchestrator_token
    return read_token(settings.orchestrator_token_file)


def read_token(path: str) -> str:
    """The token in a file.

    Raises:
        ConfigError: it cannot be read, or contains no token.
    """
    key = "delivery.orchestrator_token_file"
    token = read_secret(path, key)
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        place = secret_path(path)
        raise ConfigError(f"{key}: {place} must contain visible ASCII characters without spaces, and nothing else")
    return token
