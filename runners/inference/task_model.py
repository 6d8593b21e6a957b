"""The weights of an inference task: its checkpoint, else `model.source`."""

from __future__ import annotations

from pathlib import Path

from runners.api import Context, Preparation
from runners.inference.task import InferenceTask
from runners.models.adapters import load_adapter
from runners.models.checkpoints import load_checkpoint, model_root
from runners.models.sources import Source, local_folder, resolve_identifier
from runners.models.spec import Adapter


def find_source(ctx: Context, task: InferenceTask) -> Source:
    """The task's weights: its checkpoint, else `model.source`.

    Raises:
        BadRequest: not found.
        RunnerError: their server is unreachable.
    """
    given = task.model.source
    if task.checkpoint is None:
        where = "spec.model.source.identifier"
        return resolve_identifier(ctx, given.identifier or "", given.revision, where)
    loaded = load_checkpoint(ctx, task.checkpoint)
    folder = local_folder(ctx, model_root(loaded.folder, loaded.where), loaded.shown, loaded.where)
    tokenizer = None
    if given.identifier is not None and not has_tokenizer(folder):
        tokenizer = resolve_identifier(ctx, given.identifier, given.revision, "spec.model.source.identifier").path
    return Source(path=str(folder), revision=None, shown=loaded.shown, where=loaded.where, tokenizer=tokenizer)


def parts_ahead(ctx: Context, task: InferenceTask) -> list[Preparation]:
    """What a runner that generates can do before it has its slot, about its model; see `Runner.ahead`."""
    return [
        lambda: find_source(ctx, task).folders,
        *(_adapter(ctx, each, at) for at, each in enumerate(task.model.adapters or ())),
    ]


def _adapter(ctx: Context, adapter: Adapter, at: int) -> Preparation:
    return lambda: [load_adapter(ctx, adapter, at, f"spec.model.adapters[{at}]").folder]


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
