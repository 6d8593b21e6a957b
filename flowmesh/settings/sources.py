"""Sources of settings: the node's file, environment variables and flags, merged key by key.

Knows the valid keys, turns text into plain data, and records the origin of each value. Values are not validated here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from flowmesh.errors import ConfigError
from flowmesh.settings.moments import LATEST, SLURM_END
from flowmesh.validation.describe import dotted, found, nearest, quoted

DEFAULT = "default"
COMMAND_LINE = "command line"

VARIABLES = {
    "WORKER_ID": "node.worker_id",
    "WORKER_TAGS": "node.tags",
    "WORKER_COST_PER_HOUR": "node.cost_per_hour",
    "LOG_LEVEL": "node.log_level",
    "ENABLE_ELASTIC_SCALING": "node.elastic_scaling",
    "REDIS_URL": "redis.url",
    "REDIS_PASSWORD_FILE": "redis.password_file",
    "TASK_TOPIC": "redis.task_topic",
    "HEARTBEAT_INTERVAL_SEC": "redis.heartbeat_interval_s",
    "RESULTS_DIR": "results.dir",
    "ORCHESTRATOR_BASE_URL": "delivery.orchestrator_url",
    "ORCHESTRATOR_TOKEN": "delivery.orchestrator_token",
    "ORCHESTRATOR_TOKEN_FILE": "delivery.orchestrator_token_file",
    "WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC": "delivery.bandwidth_bytes_per_sec",
    "MODEL_CLEANUP_AFTER_UPLOAD": "delivery.cleanup_after_upload",
    "AWS_ENDPOINT_URL_S3": "cloud.endpoint_url",
    "AWS_REGION": "cloud.region",
    "AWS_SHARED_CREDENTIALS_FILE": "cloud.credentials_file",
    "AWS_PROFILE": "cloud.profile",
    "AWS_ACCESS_KEY_ID": "cloud.access_key_id",
    "AWS_SECRET_ACCESS_KEY": "cloud.secret_access_key",
    "AWS_SESSION_TOKEN": "cloud.session_token",
    "MODEL_ARCHIVE_USE_PIGZ": "archive.use_pigz",
    "MODEL_ARCHIVE_COMPRESSION_LEVEL": "archive.compression_level",
    "MODEL_ARCHIVE_PIGZ_THREADS": "archive.pigz_threads",
    "MODEL_ARCHIVE_PIGZ_BIN": "archive.pigz_bin",
    "MODEL_ARCHIVE_TAR_BIN": "archive.tar_bin",
}
"""The supported environment variables, and the key that each one sets."""

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
_TOML_AT = re.compile(r"^(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|(?P<end>end of document))\)$")


class Sections:
    """The valid keys: of each `[section]`, of each `[section.NAME]`, and of each `[[section]]` list."""

    def __init__(self, settings: type[msgspec.Struct]) -> None:
        self.plain: dict[str, dict[str, inspect.Type]] = {}
        self.named: dict[str, dict[str, inspect.Type]] = {}
        self.listed: dict[str, dict[str, inspect.Type]] = {}
        schema = inspect.type_info(settings)
        assert isinstance(schema, inspect.StructType)
        for field in schema.fields:
            if isinstance(field.type, inspect.DictType):
                self.named[field.encode_name] = _fields(field.type.value_type)
            elif isinstance(field.type, inspect.VarTupleType):
                self.listed[field.encode_name] = _fields(field.type.item_type)
            else:
                self.plain[field.encode_name] = _fields(field.type)

    @property
    def names(self) -> list[str]:
        return [*self.plain, *self.named, *self.listed]

    def keys(self) -> list[str]:
        """Every key that a flag can set, with NAME for the part that the user chooses."""
        plain = [f"{section}.{key}" for section, fields in self.plain.items() for key in fields]
        return plain + [f"{section}.NAME.{key}" for section, fields in self.named.items() for key in fields]

    def home_of(self, key: str) -> str | None:
        """The section that has `key`, to point to when it was written into another one."""
        return next((section for section, fields in self.plain.items() if key in fields), None)

    def resolve(self, key: str) -> tuple[tuple[str, ...], inspect.Type]:
        """The path and the type of a dotted key from the command line. A NAME may contain dots.

        Raises:
            ConfigError: there is no such key.
        """
        section, _, rest = key.partition(".")
        if rest in (fields := self.plain.get(section, {})):
            return (section, rest), fields[rest]
        name, _, last = rest.rpartition(".")
        if name and last in (fields := self.named.get(section, {})):
            return (section, name, last), fields[last]
        if section.partition("[")[0] in self.listed:
            raise ConfigError(f"{COMMAND_LINE}: {section}: can only be set in the file, as [[{section}]]")
        shown = quoted(key) if not key.isprintable() or len(key) > 200 else key
        if (section in self.plain and not rest) or (section in self.named and not name):
            inside = [known for known in self.keys() if known.startswith(f"{section}.")]
            if not rest:
                raise ConfigError(f"{COMMAND_LINE}: {shown}: a section, not a setting; it has {', '.join(inside)}")
        raise ConfigError(f"{COMMAND_LINE}: {shown}: unknown setting; {nearest(key, self.keys())}")


def _fields(schema: inspect.Type) -> dict[str, inspect.Type]:
    assert isinstance(schema, inspect.StructType)
    return {field.encode_name: field.type for field in schema.fields}


class Layers:
    """Merged values. The last source wins, and its origin is recorded."""

    def __init__(self, sections: Sections) -> None:
        self.sections = sections
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def put(self, path: tuple[str, ...], value: Any, origin: str) -> None:
        *groups, key = path
        place = self.values
        for group in groups:
            place = place.setdefault(group, {})
        place[key] = value
        self.origins[dotted("", path)] = origin

    def add_file(self, document: Mapping[str, Any], origin: str) -> None:
        """Raises ConfigError for an unknown section or key."""
        for section, body in document.items():
            if section not in self.sections.names:
                raise ConfigError(f"{origin}: {dotted('', (section,))}: {self._stray(section)}")
            if (fields := self.sections.listed.get(section)) is not None:
                self._add_list(section, body, fields, origin)
                continue
            _must_be_section(body, (section,), origin)
            if (fields := self.sections.plain.get(section)) is not None:
                self._add_section((section,), body, fields, origin)
                continue
            for name, inner in body.items():
                _must_be_section(inner, (section, name), origin)
                self.put((section, name), {}, origin)
                self._add_section((section, name), inner, self.sections.named[section], origin)

    def _add_section(self, path: tuple[str, ...], body: Mapping[str, Any], known: Iterable[str], origin: str) -> None:
        for key, value in body.items():
            if key not in known:
                home = self.sections.home_of(key)
                hint = f"it belongs to [{home}]" if home else nearest(key, known)
                raise ConfigError(f"{origin}: {dotted('', (*path, key))}: unknown setting; {hint}")
            self.put((*path, key), value, origin)

    def _add_list(self, section: str, body: Any, known: Iterable[str], origin: str) -> None:
        if not isinstance(body, list):
            raise ConfigError(f"{origin}: {section}: expected a list, [[{section}]], found {found(body, secret=True)}")
        for index, entry in enumerate(body):
            place = dotted("", (section, index))
            if not isinstance(entry, Mapping):
                raise ConfigError(f"{origin}: {place}: expected [[{section}]], found {found(entry, secret=True)}")
            for key in entry:
                if key not in known:
                    where = dotted("", (section, index, key))
                    raise ConfigError(f"{origin}: {where}: unknown setting; {nearest(key, known)}")
        self.put((section,), body, origin)

    def _stray(self, section: str) -> str:
        if home := self.sections.home_of(section):
            return f"a setting outside its section; it belongs to [{home}]"
        return f"unknown section; {nearest(section, self.sections.names)}"

    def add_environ(self, environ: Mapping[str, str]) -> None:
        """Empty variables count as unset."""
        for variable, key in VARIABLES.items():
            if text := environ.get(variable, "").strip():
                path, schema = self.sections.resolve(key)
                self.put(path, from_text(text, schema), variable)

    def add_slurm(self, environ: Mapping[str, str]) -> None:
        """The end of a Slurm job is that of its node, where the settings name none."""
        text = environ.get(SLURM_END, "").strip()
        if text.isdecimal() and 0 < int(text) <= LATEST and "node.ends_at" not in self.origins:
            self.put(("node", "ends_at"), int(text), SLURM_END)

    def add_flags(self, overrides: Mapping[str, str]) -> None:
        """Empty text sets an optional key back to none.

        Raises:
            ConfigError: there is no such key.
        """
        for key, text in overrides.items():
            path, schema = self.sections.resolve(key)
            self.put(path, from_text(text.strip(), schema), COMMAND_LINE)

    def origin_of(self, place: str) -> str:
        """Where the value at `place` came from. `place` may be inside a value (`node.tags[1]`) or a whole section."""
        for key, origin in self.origins.items():
            if place == key or place.startswith(f"{key}["):
                return origin
        return next((origin for key, origin in self.origins.items() if key.startswith(f"{place}.")), DEFAULT)


def _must_be_section(body: Any, path: tuple[str, ...], origin: str) -> None:
    if not isinstance(body, Mapping):
        key = dotted("", path)
        # The value may be a secret in the wrong place: show only its kind.
        raise ConfigError(f"{origin}: {key}: expected a section, [{key}], found {found(body, secret=True)}")


def from_text(text: str, schema: inspect.Type) -> Any:
    """Convert `text` to the plain data that `schema` expects; returns it unchanged where that is not possible.

    List items are separated by commas; booleans are 1/0, true/false, yes/no, on/off in any case.
    """
    kinds = [_bare(member) for member in (schema.types if isinstance(schema, inspect.UnionType) else (schema,))]
    if not text and any(isinstance(kind, inspect.NoneType) for kind in kinds):
        return None
    match next(kind for kind in kinds if not isinstance(kind, inspect.NoneType)):
        case inspect.BoolType():
            word = text.lower()
            return True if word in _TRUE else False if word in _FALSE else text
        case inspect.IntType() | inspect.FloatType() as kind:
            return _number(text, whole=isinstance(kind, inspect.IntType))
        case inspect.VarTupleType():
            return [item for part in text.split(",") if (item := part.strip())]
    return text


def _number(text: str, *, whole: bool) -> float | str:
    if re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if whole and number.is_integer() else number


def _bare(schema: inspect.Type) -> inspect.Type:
    return _bare(schema.type) if isinstance(schema, inspect.Metadata) else schema


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: it cannot be read, or is not TOML; names the line.
    """
    import tomllib

    try:
        text = path.read_bytes().decode("utf-8-sig")
        return tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {(error.strerror or 'unknown reason').lower()}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {_toml_words(str(error), text)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep") from None
    except ValueError as error:  # an integer of thousands of digits, an impossible date
        raise ConfigError(f"{path}: not TOML: {_first_line(str(error))}") from None


def _toml_words(message: str, text: str) -> str:
    if (match := _TOML_AT.match(_first_line(message))) is None:
        return f"not TOML: {_first_line(message)}"
    what = match["what"][:1].lower() + match["what"][1:]
    line = match["line"] or str(text.count("\n") + 1)
    column = f", column {match['column']}" if match["column"] else " (the end)"
    return f"line {line}{column}: {what}"


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else "it cannot be read"
