"""The model of an embedding or score task: a name, a folder, the URL of an archive, or a checkpoint."""

from __future__ import annotations

from pathlib import Path

from flowmesh.validation.s3_url import is_url
from runners.api import Context
from runners.embedding.load import MODULES, embedding_source
from runners.models.builtin import PREFIX
from runners.models.checkpoints import load_checkpoint, model_root
from runners.models.files import downloaded
from runners.models.sources import Source, check_no_revision, local_folder, resolve_identifier
from runners.models.spec import CheckpointLoad, ModelSource


def find_source(  # noqa: PLR0917
    ctx: Context, name: str | None, revision: str | None, model: ModelSource, checkpoint: CheckpointLoad | None,
    section: str, *, default: str | None = None,
) -> Source:  # fmt: skip
    """The task's model.

    Args:
        name: in the section `section` (`spec.embedding`, `spec.score`).
        model: `spec.model.source`.
        default: where the document names none.

    Raises:
        BadRequest: there is none.
        RunnerError: a server cannot be reached.
    """
    if checkpoint is not None:
        loaded = load_checkpoint(ctx, checkpoint)
        return _in_folder(ctx, loaded.folder, loaded.shown, loaded.where)
    where = f"{section}.model"
    if name is None and model.identifier is not None:
        name, revision, where = model.identifier, model.revision or revision, "spec.model.source.identifier"
    name = name or default or ""
    if is_url(name):
        check_no_revision(revision, where)
        return _in_folder(ctx, downloaded(ctx, name, "auto", where), name, where)
    if name.startswith(PREFIX):
        return resolve_identifier(ctx, name, revision, where)
    source = embedding_source(ctx, name, revision, where)
    if source.is_local:
        check_no_revision(revision, where)
    return source


def _in_folder(ctx: Context, folder: Path, shown: str, where: str) -> Source:
    listed = [each.parent for pattern in (MODULES, f"*/{MODULES}") for each in sorted(folder.glob(pattern))]
    root = listed[0] if listed else model_root(folder, where)
    return Source(path=str(local_folder(ctx, root, shown, where)), revision=None, shown=shown, where=where)
