"""`spec.model.adapters`: resolves LoRA adapters to folders on this node, with `scale` applied."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import msgspec

from flowmesh.validation.s3_url import is_url
from runners.api import BadRequest, Context
from runners.models import builtin
from runners.models.files import downloaded, existing, find_root, opened, result_url, task_folder
from runners.models.sources import Source, local_folder
from runners.models.spec import Adapter

CONFIG = "adapter_config.json"
DEFAULT_FILE = "final_lora.tar.gz"
"""An adapter's archive among a training task's delivered files."""
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
UNTOLD = frozenset(("", ".", "model", "final_model", "merged", "checkpoint", "base"))
"""Names of folders that do not tell which model they hold."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Values of `init_lora_weights` with which PEFT changes the base model's weights as it loads the adapter."""


class LocalAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """A resolved adapter, which an engine loads unchanged."""

    name: str
    folder: Path
    rank: int
    apply: Literal["runtime", "merge"]
    where: str
    ends: tuple[int, ...] = ()
    """Tokens that end its answers besides the base model's: of its generation_config.json."""
    base: str | None = None
    """The model that it was trained on, as its files name it."""


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
    if is_url(adapter.path or ""):
        adapter = msgspec.structs.replace(adapter, path=None, url=adapter.url or adapter.path)
    if all(place is None for place in (adapter.path, adapter.url, adapter.task_id)):
        raise BadRequest(f"{where}: needs a `path`, a `url` or a `taskId`")
    for each, value in (("headers", adapter.headers), ("timeoutSec", adapter.timeout_s)):
        if value is not None and adapter.url is None:
            raise BadRequest(f"{where}.{each}: goes with `url`, which is not there")
    folder, field = _find(ctx, adapter, where)
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
    return LocalAdapter(
        name=name,
        folder=folder,
        rank=max(ranks),
        apply=adapter.apply or "runtime",
        where=where,
        ends=_ends(folder, field),
        base=base_of(config),
    )


def base_of(config: dict[str, Any]) -> str | None:
    """The model that an adapter was trained on, as its configuration names it."""
    named = config.get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def warn_other_base(ctx: Context, where: str, base: str | None, source: Source) -> None:
    """Warn where an adapter names another base model than the one that it is applied to: where the shapes are the
    same, nothing else shows it. Only names are compared, not where the model lies.
    """
    names = {_last(each) for each in (base, source.shown, source.path) if each is not None}
    if base is not None and not names & UNTOLD and _last(base) not in (_last(source.shown), _last(source.path)):
        ctx.log.warning(
            "%s: its %s says that it was trained on %r, and it is applied to %r: if they are different models, its "
            "effect is not the trained one", where, CONFIG, base, source.shown,
        )  # fmt: skip


def _last(name: str) -> str:
    """The last part of a hub id or path; of a snapshot in the hub's cache, the hub id's."""
    parts = [part for part in name.replace(builtin.PREFIX, "").split("/") if part]
    if "snapshots" in parts[1:]:
        return parts[parts.index("snapshots") - 1].rpartition("--")[2].lower()
    return parts[-1].lower() if parts else ""


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


def weight_names(folder: Path) -> list[str]:
    """Names of the weights in an adapter's file, which is not read."""
    file = folder / WEIGHTS[0]
    if file.is_file():
        from safetensors import safe_open

        with safe_open(file, "pt") as weights:
            return list(weights.keys())
    import torch

    return list(torch.load(folder / WEIGHTS[1], map_location="meta", weights_only=True))


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


def _find(ctx: Context, adapter: Adapter, where: str) -> tuple[Path, str]:
    """The adapter's folder, and the field that named it: a path that exists, else a task's folder of this node, else
    a download.
    """
    archive_format = adapter.archive_format or "auto"
    path, url, task_id = adapter.path, adapter.url, adapter.task_id
    tried = []
    if path is not None:
        field = f"{where}.path"
        if path.startswith(builtin.PREFIX):
            return builtin.resolve(path, ctx.cache_dir, field), field
        there = existing(ctx, path, field, others=url is not None or task_id is not None)
        if there is not None:
            return find_root(opened(ctx, there, archive_format, field), CONFIG, "adapter", field), field
        tried.append(f"{field}: there is no {path!r} on this node")
    if task_id is not None:
        field = f"{where}.taskId"
        folder = task_folder(ctx, task_id, field)
        for each in () if folder is None else (folder / "final_lora", folder / "final_model", folder):
            if (each / CONFIG).is_file():
                return each, field
        found = "this node has no" if folder is None else f"no adapter ({CONFIG}) in the"
        tried.append(f"{field}: {found} results of task {task_id!r}")
    field = f"{where}.url" if url is not None else f"{where}.taskId"
    if url is None and task_id is not None and folder is None:
        url = result_url(ctx, task_id, DEFAULT_FILE)
    if url is None:
        raise BadRequest("; ".join(tried))
    headers, timeout_s = adapter.headers, adapter.timeout_s
    unpacked = downloaded(ctx, url, archive_format, field, headers=headers, timeout_s=timeout_s)
    return find_root(unpacked, CONFIG, "adapter", field), field


def _ends(folder: Path, field: str) -> tuple[int, ...]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return ()
    try:
        given = json.loads(file.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise BadRequest(f"{field}: its {file.name} is no JSON object ({error})") from None
    ids = given if isinstance(given, list) else [] if given is None else [given]
    return tuple(each for each in ids if isinstance(each, int))


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
