"""What the files of a model or adapter may name: files beside them, and no modules or kernels to load."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from runners.api import BadRequest, Context

SETTING = "tasks.trust_remote_code"
MODULES = "modules.json"
"""Of sentence-transformers: the classes that a model is made of."""


def check_names(folder: Path, where: str, ctx: Context) -> None:
    """Raises BadRequest where files of a model or adapter name files outside of it, or modules to import."""
    for index in folder.glob("*.index.json"):
        names = read_json(index).get("weight_map")
        _check_inside(names.values() if isinstance(names, dict) else (), index.name, where)
    config = read_json(folder / "config.json")
    _check_inside([config.get("transformers_weights")], "config.json", where)
    for field in ("attn_implementation", "_attn_implementation"):
        name = config.get(field)
        for each in name.values() if isinstance(name, dict) else [name]:
            check_attention(ctx, each if isinstance(each, str) else None, f"{where}: {field} of its config.json")
    tokenizer = read_json(folder / "tokenizer_config.json")
    files = [value for key, value in tokenizer.items() if key.endswith("_file")]
    _check_inside([*files, *texts(tokenizer.get("fast_tokenizer_files"))], "tokenizer_config.json", where)
    modules = read_json(folder / MODULES, list)
    _check_inside([each.get("path") for each in modules if isinstance(each, dict)], MODULES, where)
    router = read_json(folder / "router_config.json")
    _check_inside(texts(router.get("structure")), "router_config.json", where)
    _check_adapter(read_json(folder / "adapter_config.json"), where)


def check_attention(ctx: Context, name: str | None, where: str) -> None:
    """Raises BadRequest for an attention that is a kernel of the hub (`owner/name`), unless the operator trusts it."""
    if name is None or "/" not in name:
        return
    repository = name.rpartition("|")[2].partition(":")[0].partition("@")[0]
    if not hub_trusted(ctx, repository):
        allowed = f"this node runs it only where its setting {SETTING} lists {repository!r}"
        raise BadRequest(f"{where}: {name!r} is code of the hub; {allowed}")


def hub_trusted(ctx: Context, repository: str) -> bool:
    """Whether the operator trusts code of a repository of the hub."""
    return any(
        fnmatch.fnmatchcase(repository, pattern)
        for pattern in ctx.job.permits.trust_remote_code
        if not pattern.startswith("/")
    )


def _check_adapter(config: dict[str, Any], where: str) -> None:
    library = (config.get("auto_mapping") or {}).get("parent_library") or "transformers"
    core = config.get("megatron_core") or "megatron.core"
    for name, module, wanted in (("auto_mapping", library, "transformers"), ("megatron_core", core, "megatron.core")):
        if not (module == wanted or str(module).startswith(f"{wanted}.")):
            raise BadRequest(f"{where}: {name} of its adapter_config.json names a module to import; remove it")
    for name in ("corda_config", "lora_ga_config", "eva_config"):
        options = config.get(name)
        if isinstance(options, dict) and any(key.endswith("_file") and value for key, value in options.items()):
            raise BadRequest(f"{where}: {name} of its adapter_config.json names files; remove it")


def _check_inside(names: Iterable[Any], file: str, where: str) -> None:
    for name in names:
        path = PurePosixPath(str(name))
        if name and (path.is_absolute() or ".." in path.parts or "://" in str(name)):
            raise BadRequest(f"{where}: its {file} names a file outside of the folder")


def texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for each in value.values():
                yield from texts(each)
        case list():
            for each in value:
                yield from texts(each)


def read_json(path: Path, kind: type[Any] = dict) -> Any:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return kind()  # whoever loads the model reports it
    return found if isinstance(found, kind) else kind()
