"""The weights of an inference task: its checkpoint, else `model.source`."""

from __future__ import annotations

from pathlib import Path

from runners.api import Context
from runners.inference.task import InferenceTask
from runners.models.checkpoints import load_checkpoint, model_root
from runners.models.sources import Source, local_folder, resolve_identifier


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


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
