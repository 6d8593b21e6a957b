"""The files of agent configurations: found by name, one extending another, filled from the environment, checked."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from flowmesh import installed
from flowmesh.validation.convert import FieldError, convert, nearest
from runners.agent.config import AgentConfig, SearchProvider
from runners.agent.secrets import from_env
from runners.api import BadRequest, Context
from runners.fields import Faults

T = TypeVar("T")

FOLDER = Path("conf") / "agents"
PROVIDERS_FILE = "search_providers.yaml"
MAX_EXTENDS = 8
MAX_FOLDERS = 1000
MAX_LISTED = 50
SUFFIXES = (".yaml", ".yml")
HIDDEN = (".", "_")
_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


def agents_folder(ctx: Context) -> Path:
    """The node's agents folder: from its settings, else conf/agents where it runs, else the installed one."""
    if isinstance(wanted := ctx.job.limits.get("agents_dir"), str) and wanted:
        return Path(wanted)
    if FOLDER.is_dir():
        return FOLDER.absolute()
    return installed.conf() / FOLDER.name


def load_config(ctx: Context, name: str, where: str) -> AgentConfig:
    """The configuration of that name.

    Raises:
        BadRequest: it does not exist (names those that do), or it is wrong (names file and field).
    """
    folder = agents_folder(ctx)
    data = _read(folder, name, where, ())
    config = ctx.check(_filled(data, name), AgentConfig, name)
    _check(config, name)
    return config


def check_file(path: Path, data: dict[str, Any]) -> None:
    """Check a configuration, or the file of search providers, without the environment's variables.

    Args:
        path: its file, to find the configurations that it extends.
        data: its content.

    Raises:
        BadRequest: naming all fields that are wrong, as paths in the file.
    """
    faults = Faults()
    if path.name == PROVIDERS_FILE:
        for name, provider in data.items():
            faults.read(lambda name=name, provider=provider: _convert(provider, SearchProvider, str(name)))  # type: ignore[misc]
    else:
        _check_config_file(path, data, faults)
    faults.check()


def _check_config_file(path: Path, data: dict[str, Any], faults: Faults) -> None:
    base = data.get("extends")
    whole: dict[str, Any] | None = {key: value for key, value in data.items() if key != "extends"}
    if base is not None:
        whole = faults.read(lambda: _merged(_below(path, base), whole or {}))
    config = faults.read(lambda: _convert(_merged({}, whole or {}), AgentConfig, ""))
    if config is not None and whole is not None:
        faults.read(lambda: _check(config, ""))


def _below(path: Path, base: Any) -> dict[str, Any]:
    """What a file extends, whose name counts from the agents folder: the nearest folder above that has it."""
    if not isinstance(base, str):
        raise BadRequest("extends: expected the name of a configuration")
    for folder in path.absolute().parents[:MAX_EXTENDS]:
        if any((folder / f"{base}{suffix}").is_file() for suffix in ("", *SUFFIXES)):
            own = path.absolute().relative_to(folder).with_suffix("").as_posix()
            return _read(folder, base, "extends", (own,))
    raise BadRequest(f"extends: unknown agent configuration {base!r:.200}; it counts from the agents folder")


def _convert(value: Any, into: type[T], where: str) -> T:
    try:
        return convert(value, into, where=where)
    except FieldError as error:
        raise BadRequest(str(error), error.faults) from None


def load_provider(ctx: Context, name: str, where: str) -> SearchProvider:
    """A search provider by name.

    Raises:
        BadRequest: it does not exist, or it is wrong.
    """
    path = agents_folder(ctx) / PROVIDERS_FILE
    providers = _parse(path) if path.is_file() else {}
    if name not in providers:
        known = f"known: {', '.join(sorted(providers))}" if providers else "it has none"
        raise BadRequest(f"{where}: no search provider {name!r} in {PROVIDERS_FILE}; {known}")
    return ctx.check(_filled(providers[name], f"{PROVIDERS_FILE}:{name}"), SearchProvider, f"{PROVIDERS_FILE}:{name}")


def known_names(folder: Path) -> list[str]:
    """The configurations in a folder and the folders below it, as documents name them: `examples/search_agent`."""
    return sorted(_files(folder))


def _files(folder: Path) -> dict[str, Path]:
    """Each configuration's file by name. Files and folders that begin with `.` or `_` are none.

    Links are followed, as a mounted ConfigMap consists of them; a folder that is linked into itself is read once.
    """
    found: dict[str, Path] = {}
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):  # the operator's folder, which no task writes
        about = Path(parent).stat()
        if (about.st_dev, about.st_ino) in seen or len(seen) >= MAX_FOLDERS:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        for name in sorted(names, reverse=True):  # .yaml before .yml of the same name
            path = Path(parent, name)
            if path.suffix in SUFFIXES and not name.startswith(HIDDEN) and name != PROVIDERS_FILE and path.is_file():
                found[path.relative_to(folder).with_suffix("").as_posix()] = path
    return found


def _read(folder: Path, name: str, where: str, seen: tuple[str, ...]) -> dict[str, Any]:
    """A file merged over what it extends. Only names that were found by walking the folder are opened."""
    files = _files(folder)
    stem = name if name in files else str(PurePosixPath(name).with_suffix("")) if name.endswith(SUFFIXES) else name
    if stem not in files:
        raise BadRequest(f"{where}: unknown agent configuration {name!r:.200}; {_hint(name, sorted(files), folder)}")
    if stem in seen or len(seen) > MAX_EXTENDS:
        raise BadRequest(f"{stem}.extends: extends itself: {' → '.join((*seen, stem))}")
    data = _parse(files[stem])
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise BadRequest(f"{stem}.extends: expected the name of a configuration")
    return _merged(_read(folder, base, f"{stem}.extends", (*seen, stem)), data)


def _hint(name: str, known: list[str], folder: Path) -> str:
    if not known:
        return f"there are none in {folder} (runners.agents_dir)"
    listed = ", ".join(known[:MAX_LISTED]) + (f" and {len(known) - MAX_LISTED} more" if len(known) > MAX_LISTED else "")
    alike = [each for each in known if PurePosixPath(each).name == PurePosixPath(name).name]
    hint = f"did you mean {alike[0]!r}?" if alike else nearest(name, known)
    return f"{hint} (known: {listed})" if hint.startswith("did you mean") else f"known: {listed}"


def _parse(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path.name}: not YAML: {' '.join(str(error).split())[:300]}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise BadRequest(f"{path.name}: expected a mapping (found {type(data).__name__})")
    return data


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`: mappings are merged, other values replaced; null removes a key."""
    joined = dict(below)
    for key, value in above.items():
        if value is None:
            joined.pop(key, None)
        elif isinstance(value, dict) and isinstance(joined.get(key), dict):
            joined[key] = _merged(joined[key], value)
        else:
            joined[key] = value
    return joined


def _filled(value: Any, where: str) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in texts from the environment."""
    match value:
        case str():
            return _VARIABLE.sub(lambda match: _variable(match, where), value)
        case dict():
            return {key: _filled(each, f"{where}.{key}") for key, each in value.items()}
        case list():
            return [_filled(each, f"{where}[{index}]") for index, each in enumerate(value)]
    return value


def _variable(match: re.Match[str], where: str) -> str:
    if match["default"] is not None:
        return os.environ.get(match["name"]) or match["default"]
    return from_env(match["name"], where)


def _check(config: AgentConfig, name: str) -> None:
    at = f"{name}." if name else ""
    model = config.model
    if model.type == "local" and model.identifier is None:
        raise BadRequest(f"{at}model.identifier: missing; a local model needs a hub id or a folder")
    if model.type == "openai" and (model.base_url is None) == (model.serve is None):
        raise BadRequest(f"{at}model.base_url: give either the endpoint's address, or `serve` to start one")
    if config.type != "simple" and not config.workers:
        raise BadRequest(f"{at}workers: missing; type {config.type!r} needs at least one")
    if config.type == "simple" and config.workers:
        raise BadRequest(f"{at}workers: only orchestra and workforce have workers")
    for server, each in config.mcp_servers.items():
        where = f"{at}mcp_servers.{server}"
        needed = "command" if each.transport == "stdio" else "url"
        if getattr(each, needed) is None:
            raise BadRequest(f"{where}.{needed}: missing; {each.transport} needs it")
    for worker, member in config.workers.items():
        for server in member.mcp_servers or ():
            if server not in config.mcp_servers:
                hint = nearest(server, list(config.mcp_servers)) if config.mcp_servers else "there are none"
                raise BadRequest(f"{at}workers.{worker}.mcp_servers: no server {server!r}; {hint}")
