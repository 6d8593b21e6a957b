"""Loads the settings: the node's file, environment variables over it, command line flags over both.

A setting that cannot be used is a ConfigError: where it came from, the key, what was found, what is allowed. Secrets
are in neither an error nor a report.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.errors import ConfigError, FieldError
from flowmesh.redaction import Redactor, in_address
from flowmesh.settings.checks import all_faults, first_fault
from flowmesh.settings.schema import Section, Settings
from flowmesh.settings.sources import DEFAULT, Layers, Sections, read_toml
from flowmesh.validation.convert import convert
from flowmesh.validation.describe import dotted, quoted

_LONG_PATH = 16
"""Characters: a shorter part of a webhook's path is a word rather than a secret."""


class Loaded(msgspec.Struct, frozen=True):
    """Settings, and where each value came from."""

    settings: Settings
    origins: dict[str, str]
    """By key: the file, the variable, or `command line`. A key that is missing here has its default."""


class Described(msgspec.Struct, frozen=True):
    """One setting as `--check` reports it."""

    key: str
    value: Any
    """Plain data; secrets are redacted."""
    origin: str
    """`default`, the file, the environment variable, or `command line`."""

    @property
    def text(self) -> str:
        """The value as the file would have it; `-` for none."""
        return _text(self.value)


def load(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, str] | None = None) -> Loaded:
    """Load the settings: of the file, overridden by the environment, overridden by the command line.

    Args:
        path: the node's file; None: only variables and flags.
        environ: the environment variables; see VARIABLES.
        overrides: dotted key (`redis.url`) to text, from `--set KEY=VALUE` and from options such as `--redis-url`.

    Raises:
        ConfigError: one line with the origin, the key, what was found and what is allowed.
    """
    layers = Layers(Sections(Settings))
    if path is not None:
        layers.add_file(read_toml(path), str(path))
    layers.add_environ(environ)
    layers.add_slurm(environ)
    layers.add_flags(overrides or {})
    _normalise(layers.values)
    try:
        settings = convert(layers.values, Settings, where="")
    except FieldError as error:
        raise ConfigError(f"{layers.origin_of(error.path)}: {error}") from None
    if fault := first_fault(settings):
        key = dotted("", fault.path)
        raise ConfigError(f"{layers.origin_of(key)}: {key}: {fault.what}")
    return Loaded(settings, layers.origins)


def faults_of(document: dict[str, Any]) -> tuple[str, ...]:
    """All that is wrong with a node's file by itself, each as `section.key: …`; without variables and flags.

    Args:
        document: its content; is changed.
    """
    _normalise(document)
    try:
        settings = convert(document, Settings, where="")
    except FieldError as error:
        return error.faults
    return tuple(f"{dotted('', fault.path)}: {fault.what}" for fault in all_faults(settings))


def _normalise(values: dict[str, Any]) -> None:
    """Bring the case of those values into one form that the settings take in any."""
    node, redis, notify = values.get("node"), values.get("redis"), values.get("notify")
    if isinstance(node, dict) and isinstance(level := node.get("log_level"), str):
        node["log_level"] = level.upper()
    if isinstance(node, dict) and isinstance(end := node.get("ends_at"), datetime.datetime):
        node["ends_at"] = end.isoformat()
    if isinstance(redis, dict) and isinstance(url := redis.get("url"), str):
        redis["url"] = _with_lower_scheme(url)
    if isinstance(notify, dict) and isinstance(url := notify.get("url"), str):
        notify["url"] = [url]


def _with_lower_scheme(url: str) -> str:
    """redis-py accepts schemes in lower case only."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme.lower()}://{rest}" if separator else url


def secrets(settings: Settings) -> Redactor:
    """Hides the node's own secrets, and what looks like a credential."""
    cloud = settings.cloud
    own = (settings.delivery.orchestrator_token, cloud.secret_access_key, cloud.session_token)
    hides = Redactor(own, prose=True)
    for address in (settings.redis.url, settings.delivery.orchestrator_url, cloud.endpoint_url):
        for secret in in_address(address or ""):
            hides.learn(secret)
    for url in settings.notify.url:
        hides.learn(url)
        path = url.partition("://")[2].partition("/")[2]
        for part in (path, *path.split("/")) if len(path) >= _LONG_PATH else ():
            hides.learn(part if len(part) >= _LONG_PATH else None)
    return hides


def describe(loaded: Loaded) -> list[Described]:
    """Every setting, in the order of the file."""
    described = []
    for path, section in _sections(loaded.settings):
        for name, value in section.__rich_repr__():
            key = dotted("", (*path, name))
            given = key if key in loaded.origins else path[0]  # a list is set as a whole
            described.append(Described(key, msgspec.to_builtins(value), loaded.origins.get(str(given), DEFAULT)))
    return described


def _sections(settings: Settings) -> Iterator[tuple[tuple[str | int, ...], Section]]:
    for name in settings.__struct_fields__:
        match getattr(settings, name):
            case Section() as section:
                yield (name,), section
            case dict() as named:
                for inner, section in named.items():
                    yield (name, inner), section
            case tuple() as listed:
                for index, section in enumerate(listed):
                    yield (name, index), section


def _text(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return str(value).lower()
        case str():
            return quoted(value, limit=None)
        case list() | tuple():
            return f"[{', '.join(map(_text, value))}]"
    return str(value)
