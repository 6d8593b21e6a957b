"""The digest of a model's files, part of the keys of rows."""

from __future__ import annotations

from pathlib import Path

from runners.models.sources import Source, loading
from runners.rows.keys import folder_digest


def weights_digest(source: Source, path: str, name: str = "config.json") -> str:
    """Digest of a model's folder, or the commit of a hub's model.

    Args:
        path: the folder, or the id on the hub.
        name: a file that the hub's model has.

    Raises:
        BadRequest, RunnerError: as for `sources.loading`.
    """
    if Path(path).is_dir():
        return folder_digest(Path(path))
    with loading(source):
        from transformers.utils import cached_file

        found = cached_file(path, name, revision=source.revision)
    return f"{path}@{source.revision}" if found is None else folder_digest(Path(found).parent)
