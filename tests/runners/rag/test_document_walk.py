"""Folders of documents that another task may have written: any depth, links, mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("faiss", reason="needs the extra 'rag'")

from flowmesh.files.removal import remove_path
from runners.rag.documents import read_documents
from tests.kit.hostile import bind, cannot_mount, in_child, make_deep


def test_deep_folders_are_listed_and_rights_stay(make_context, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o500)
    (tmp_path / "b.txt").write_text("text")
    make_deep(tmp_path, 1200, "d" * 5)
    try:
        found = read_documents(make_context({}), None, str(tmp_path), "spec.faiss")
        assert [each.id for each in found.read] == ["b.txt"]
        [deep] = found.skipped
        assert deep.reason == "cannot be read: File name too long"
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o500
    finally:
        remove_path(tmp_path / "ddddd")


@pytest.mark.skipif(bool(why := cannot_mount()), reason=why or "-")
def test_what_is_mounted_is_listed(make_context, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "secret.txt").write_text("secret")
    folder = tmp_path / "documents"
    (folder / "inside").mkdir(parents=True)
    (folder / "own.txt").write_text("own")
    ctx = make_context({})

    def look() -> None:
        bind(tmp_path / "others", folder / "inside")
        found = read_documents(ctx, None, str(folder), "spec.faiss")
        assert [each.id for each in found.read] == ["own.txt"]
        assert [(each.document, each.reason) for each in found.skipped] == [
            ("inside/", "something is mounted there: name it itself")
        ]

    in_child(look, mounts=True)
