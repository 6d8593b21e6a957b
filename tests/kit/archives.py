"""Archives of a folder by its path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flowmesh.files.folder import Folder
from flowmesh.results import archive
from flowmesh.results.archive import Archive
from flowmesh.settings.schema import ArchiveSettings


def make_archive(
    folder: Path, target: Path, settings: ArchiveSettings, written: Callable[[int], object] = lambda _: None
) -> Archive:
    """Archive `folder` as `target`, which lies beside it."""
    assert folder.parent == target.parent
    with Folder.open(folder.parent) as top:
        return archive.make_archive(top, (folder.name,), target.name, settings, lambda size, _: written(size))
