"""`spec.model.adapters`: resolves LoRA adapters to folders on this node, with `scale` applied."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import msgspec

from runners.api import BadRequest, Context
from runners.models import builtin
from runners.models.files import downloaded, find_root, opened, task_folder
from runners.models.sources import local_folder, local_path
from runners.models.spec import Adapter

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Values of `init_lora_weights` with which PEFT changes the base model's weights as it loads the adapter."""


class LocalAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """A resolved adapter, which an engine loads unchanged."""

    name: str
    folder: Path
    rank: int
    apply: Literal["runtime", "merge"]
    where: str


def load_adapters(
    ctx: Context, adapters: tuple[Adapter, ...] | None, where: str = "spec.model.adapters"
) -> tuple[LocalAdapter, ...]:
    """Fetch every adapter, in the document's order.

    Raises:
        BadRequest: one is missing, is not a LoRA, or has the name of another.
        RunnerError: its server is unreachable.
    """
    loaded: list[LocalAdapter] = []
    for i, adapter in enumerate(adapters or ()):
        one = load_adapter(ctx, adapter, i, f"{where}[{i}]")
        if any(one.name == other.name for other in loaded):
            raise BadRequest(f"{one.where}.name: {one.name!r} is also another adapter's name")
        loaded.append(one)
    return tuple(loaded)


def load_adapter(ctx: Context, adapter: Adapter, index: int, where: str) -> LocalAdapter:
    """Resolve one adapter. For a scale other than 1, make a copy with a scaled alpha.

    Raises:
        BadRequest: it is missing, is not a LoRA, or cannot be scaled.
        RunnerError: its server is unreachable.
    """
    given = [name for name in ("path", "url", "task_id") if getattr(adapter, name) is not None]
    if len(given) != 1:
        raise BadRequest(f"{where}: give exactly one of `path`, `url` and `taskId`")
    for each, value in (("headers", adapter.headers), ("timeoutSec", adapter.timeout_s)):
        if value is not None and adapter.url is None:
            raise BadRequest(f"{where}.{each}: goes with `url`, which is not there")
    field = f"{where}.{'taskId' if given[0] == 'task_id' else given[0]}"
    folder = _folder(ctx, adapter, field)
    local_folder(ctx, folder, folder.name, field)
    config = _config(folder, field)
    scale = 1.0 if adapter.scale is None else adapter.scale
    if not math.isfinite(scale):
        raise BadRequest(f"{where}.scale: expected a finite number (found {scale})")
    if scale != 1.0:
        if more := beyond_product(config):
            raise BadRequest(
                f"{where}.scale: {scale:g}, but this adapter is more than a product A × B, which is all that can be "
                f"scaled ({', '.join(more)}); leave scale out"
            )
        folder = scaled_copy(folder, config, scale, Path(tempfile.mkdtemp(prefix="adapter-", dir=ctx.tmp_dir)))
    name = adapter.name if adapter.name is not None else str(adapter.id if adapter.id is not None else index + 1)
    if not name or "." in name:
        raise BadRequest(f"{where}.name: {name!r} cannot be an adapter's name; leave out dots")
    ranks = [config.get("r") or 1, *(config.get("rank_pattern") or {}).values()]
    return LocalAdapter(name=name, folder=folder, rank=max(ranks), apply=adapter.apply or "runtime", where=where)


def scaled_copy(folder: Path, config: dict[str, Any], scale: float, target: Path) -> Path:
    """Copy the adapter into the empty folder `target`, with its effect multiplied by `scale`; weights are symlinks.

    A LoRA adds alpha / r (or alpha / sqrt(r)) times its product, so scaling every alpha scales the effect exactly.
    """
    for each in folder.iterdir():
        if each.name != CONFIG:
            (target / each.name).symlink_to(each.resolve())
    changed = {**config, "lora_alpha": (config.get("lora_alpha") or 8) * scale}
    if pattern := config.get("alpha_pattern"):
        changed["alpha_pattern"] = {name: alpha * scale for name, alpha in pattern.items()}
    (target / CONFIG).write_text(json.dumps(changed, indent=2))
    return target


def check_product(adapter: LocalAdapter, engine: str) -> None:
    """Raises BadRequest for an adapter that is more than a product A × B, for an engine that applies only these."""
    if more := beyond_product(_config(adapter.folder, adapter.where)):
        raise BadRequest(
            f"{adapter.where}: {engine} cannot apply the adapter at run time: it is more than a product A × B "
            f"({', '.join(more)}); set apply: merge"
        )


def beyond_product(config: dict[str, Any]) -> list[str]:
    """What in an adapter's configuration changes the model by more than alpha / r times A × B, as `field=value`."""
    fields = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "layer_replication")
    more = [f"{name}={config[name]!r}" for name in fields if config.get(name)]
    if config.get("bias", "none") != "none":
        more.append(f"bias={config['bias']!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        more.append(f"init_lora_weights={init!r}")
    return more


def _folder(ctx: Context, adapter: Adapter, field: str) -> Path:
    archive_format = adapter.archive_format or "auto"
    if adapter.url is not None:
        unpacked = downloaded(
            ctx, adapter.url, archive_format, field, headers=adapter.headers, timeout_s=adapter.timeout_s
        )
        return find_root(unpacked, CONFIG, "adapter", field)
    if adapter.task_id is not None:
        folder = task_folder(ctx, adapter.task_id, field)
        if folder is None:
            raise BadRequest(f"{field}: this node has no results of task {adapter.task_id!r}")
        for each in (folder / "final_lora", folder / "final_model", folder):
            if (each / CONFIG).is_file():
                return each
        raise BadRequest(f"{field}: the results of task {adapter.task_id!r} hold no adapter ({CONFIG})")
    if (adapter.path or "").startswith(builtin.PREFIX):
        return builtin.resolve(adapter.path or "", ctx.cache_dir, field)
    path = local_path(ctx, adapter.path or "", field)
    if not path.exists():
        raise BadRequest(f"{field}: there is no {adapter.path!r} on this node")
    return find_root(opened(ctx, path, archive_format, field), CONFIG, "adapter", field)


def _config(folder: Path, field: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise BadRequest(f"{field}: its {CONFIG} is not JSON ({error})") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise BadRequest(f"{field}: an adapter of type {kind!r}; only LORA adapters can be applied")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise BadRequest(f"{field}: the adapter has no weights ({' or '.join(WEIGHTS)})")
    return config
