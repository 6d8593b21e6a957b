"""Finds a command's Redis and the node's folders: from its flags, the environment, or the node's file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowmesh.errors import ConfigError, UnavailableError
from flowmesh.redaction import redact_url
from flowmesh.settings import addresses, load, paths
from flowmesh.settings.schema import RedisSettings, Settings
from flowmesh.settings.secret_files import read_secret

if TYPE_CHECKING:
    import redis

TIMEOUT_S = 10.0

config_option = click.option(
    "--config", type=click.Path(dir_okay=False), metavar="FILE", help="The node's settings (conf/node.toml)."
)
redis_option = click.option(
    "--redis",
    "redis_url",
    metavar="URL",
    help="redis://, rediss://, unix:// or redis+sentinel:// address; else REDIS_URL, else from --config.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
state_dir_option = click.option(
    "--state-dir", type=click.Path(file_okay=False), metavar="DIR", help="The node's state_dir; else from --config."
)


def node_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that talks to the node on this machine."""
    return config_option(state_dir_option(json_option(command)))


def settings(config_file: str | None, **flags: str | None) -> Settings:
    """Load the settings as the node would.

    Args:
        flags: section__key=value overrides; None where the flag was not given.

    Raises:
        ConfigError: a setting cannot be used.
    """
    overrides = {name.replace("__", "."): value for name, value in flags.items() if value is not None}
    return load.load(Path(config_file) if config_file is not None else None, os.environ, overrides).settings


def deployment_of(flag: str | None, config_file: str | None) -> tuple[str, str]:
    """The address of the deployment's Redis, and the channel on which tasks are dispatched.

    Raises:
        ConfigError: no address is set.
    """
    own_password = "" if flag is not None and not addresses.redis_fault(flag) and addresses.has_password(flag) else None
    found = settings(config_file, redis__url=flag, redis__password_file=own_password).redis
    if not found.url:
        raise ConfigError("no Redis address: give --redis URL, set REDIS_URL, or give --config FILE with redis.url")
    return address_of(found), found.task_topic


def address_of(redis: RedisSettings) -> str:
    """The address of the settings' Redis, with the password that `redis.password_file` contains now.

    Raises:
        ConfigError: the file cannot be read.
    """
    assert redis.url is not None
    if redis.password_file is None:
        return redis.url
    return addresses.with_password(redis.url, read_secret(redis.password_file, "redis.password_file"))


def results_dir(flag: str | None, config_file: str | None) -> Path:
    """The folder with the results of all tasks."""
    return paths.results_dir(settings(config_file, results__dir=flag))


def state_dir(flag: str | None, config_file: str | None) -> Path:
    """The folder of this node's journal and sockets."""
    return paths.state_dir(settings(config_file, node__state_dir=flag), os.environ)


@contextlib.contextmanager
def connected(url: str) -> Iterator[redis.Redis]:
    """A Redis client, after a PING was answered.

    Raises:
        ConfigError: the address cannot be used.
        UnavailableError: Redis does not answer, or stops answering inside the `with` block; names the address.
    """
    import redis

    from flowmesh.client.connection import open_client

    client = open_client(url, timeout_s=TIMEOUT_S)
    try:
        with client:
            client.ping()
            yield client
    except redis.AuthenticationError as error:
        raise UnavailableError(
            f"Redis at {redact_url(url)} refused the login: {error}; check user name and password in the address"
        ) from None
    except redis.RedisError as error:
        raise UnavailableError(f"Redis at {redact_url(url)} does not answer: {_short(error)}") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
