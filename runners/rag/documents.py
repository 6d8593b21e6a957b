"""The passages of an index: documents are read, cut, and given ids and payloads."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.files.walk import Troubles, walk
from flowmesh.validation.convert import nearest
from flowmesh.validation.names import kind
from runners.api import BadRequest, Context
from runners.data.documents import BinaryFile, UnreadableDocument, document_text
from runners.data.prompts import Items, check_text
from runners.data.reading import Refused
from runners.data.sources import LOADERS
from runners.models.sources import local_path
from runners.rag.chunks import Window, split, token_offsets

BATCH_DOCUMENTS = 256
MAX_FILE_BYTES = 64 * 2**20
MAX_LISTED = 200
"""Upper bound of skipped documents that a result lists; it always gives their number."""


class Passage(msgspec.Struct, frozen=True):
    """The data of one vector; the payload of a hit."""

    id: str | int
    text: str
    document: str | int
    """Which document it is from: the id in its metadata, its path, or its number."""
    chunk: int
    """Which of the document's passages, from 0."""
    metadata: dict[str, Any] | None = None


class Document(msgspec.Struct, frozen=True):
    id: str | int
    text: str
    metadata: dict[str, Any] | None


class Skipped(msgspec.Struct, frozen=True):
    """A document that is not in the index."""

    document: str | int
    """Its id: a path below the folder; those of folders end in a slash."""
    reason: str
    minor: bool = False
    """Hidden or binary. Listed after the others."""


class Documents(msgspec.Struct, frozen=True):
    """The documents of a task, and those that could not be read."""

    read: tuple[Document, ...]
    skipped: tuple[Skipped, ...]


def read_documents(ctx: Context, section: dict[str, Any] | None, path: str | None, where: str) -> Documents:
    """The documents of `faiss.documents` or `faiss.path`.

    Raises:
        BadRequest: there are none, a row is not a text, or two have the same id.
        Cancelled: the node asked the task to stop.
    """
    if section is not None:
        return _of_source(load_source(ctx, section, f"{where}.documents"), f"{where}.documents")
    assert path is not None, "one of the two is given"
    return _of_path(ctx, local_path(ctx, path, f"{where}.path"), path, f"{where}.path")


def load_source(ctx: Context, section: dict[str, Any], where: str) -> Items:
    """A data source under any name.

    Raises:
        BadRequest: naming the field.
    """
    kind = section.get("type")
    if not isinstance(kind, str):
        raise BadRequest(f"{where}.type: missing; one of {', '.join(sorted(LOADERS))}")
    if kind not in LOADERS:
        raise BadRequest(f"{where}.type: unknown source {kind!r}; {nearest(kind, list(LOADERS))}")
    items = LOADERS[kind](ctx, section, None, ctx.spec, where)
    for prompt, place in zip(items.prompts, items.wheres, strict=True):
        check_text(prompt, place)
    return items


def to_json(skipped: Sequence[Skipped]) -> dict[str, Any]:
    """The result's fields about skipped documents: at most MAX_LISTED with their reasons, and the number of all."""
    if not skipped:
        return {}
    listed = sorted(skipped, key=lambda each: (each.minor, str(each.document)))[:MAX_LISTED]
    return {
        "skipped": [{"document": each.document, "reason": each.reason} for each in listed],
        "skipped_count": len(skipped),
    }


def text_of(prompt: Any, where: str) -> str:
    """A row as one text.

    Raises:
        BadRequest: it is a chat.
    """
    if not isinstance(prompt, str):
        raise BadRequest(f"{where}: chat messages cannot be embedded; give one text")
    return prompt


def cut_documents(
    ctx: Context, documents: Sequence[Document], tokenizer: Any, cut: Window
) -> tuple[list[Passage], list[Skipped]]:
    """The passages of all documents, in order, and the documents that are empty.

    Raises:
        BadRequest: two passages would have the same id.
        Cancelled: the node asked the task to stop.
    """
    passages: list[Passage] = []
    empty: list[Skipped] = []
    for first in range(0, len(documents), BATCH_DOCUMENTS):
        ctx.check_cancelled()
        batch = documents[first : first + BATCH_DOCUMENTS]
        for document, offsets in zip(batch, token_offsets(tokenizer, [each.text for each in batch]), strict=True):
            texts = split(document.text, offsets, cut)
            if not texts:
                empty.append(Skipped(document.id, "empty"))
            for chunk, text in enumerate(texts):
                name = document.id if len(texts) == 1 else f"{document.id}#{chunk}"
                passages.append(Passage(name, text, document.id, chunk, document.metadata))
    _check_ids(passages)
    return passages, empty


def _check_ids(passages: Sequence[Passage]) -> None:
    seen: dict[str, Passage] = {}
    for each in passages:
        other = seen.setdefault(str(each.id), each)
        if other is not each:
            raise BadRequest(
                f"spec.faiss: a passage of document {each.document!r} and one of {other.document!r} would both have "
                f"the id {each.id!r}; rename one of the documents"
            )


def _of_source(items: Items, where: str) -> Documents:
    documents = []
    seen: dict[str, str] = {}
    for index, (prompt, metadata, place) in enumerate(zip(items.prompts, items.metadata, items.wheres, strict=True)):
        name = id_of(metadata, index, place)
        if str(name) in seen:  # passages of 7 and "7" would have the same id
            raise BadRequest(f"{place}: its id {name!r} is also that of {seen[str(name)]}; ids in metadata must differ")
        seen[str(name)] = place
        documents.append(Document(name, text_of(prompt, place), metadata))
    if not documents:
        raise BadRequest(f"{where}: no documents there")
    return Documents(tuple(documents), ())


def id_of(metadata: dict[str, Any] | None, index: int, place: str) -> str | int:
    """The id in a row's metadata, else its number as text.

    Raises:
        BadRequest: it is neither a string nor an integer.
    """
    own = (metadata or {}).get("id")
    if own is None:
        return str(index)
    if isinstance(own, bool) or not isinstance(own, str | int):
        raise BadRequest(f"{place}: the id in its metadata must be a string or an integer (found {kind(own)})")
    return own


def _of_path(ctx: Context, path: Path, shown: str, where: str) -> Documents:
    if path.is_file():
        try:
            return Documents((Document(path.name, _text_of_file(ctx, path, path.name), {"path": path.name}),), ())
        except UnreadableDocument as error:
            raise BadRequest(f"{where}: {path.name!r} is not a text file or readable document: {error}") from None
    if not path.is_dir():
        raise BadRequest(f"{where}: there is no file or folder {shown!r} on this node")
    found = list(_walk(ctx, path))
    documents = tuple(each for each in found if isinstance(each, Document))
    skipped = tuple(each for each in found if isinstance(each, Skipped))
    if not documents:
        reasons = "; ".join(f"{each.document}: {each.reason}" for each in skipped[:3]) or "it is empty"
        raise BadRequest(
            f"{where}: {shown!r} has no text files or documents that can be read ({reasons}); "
            "rows of a table are for `documents`, an index has to hold index.faiss"
        )
    return Documents(documents, skipped)


def _walk(ctx: Context, folder: Path) -> Iterator[Document | Skipped]:
    """Every file below `folder`: its text, or the reason why it is skipped."""

    unlisted = _Unlisted()
    try:
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BadRequest(f"spec.faiss.path: {str(folder)!r} cannot be listed: {error.strerror}") from None
    try:
        for entry in walk(top, unlisted, ordered=True, rights=0, passed_over=lambda name: name.startswith(".")):
            ctx.check_cancelled()
            shown = entry.path
            if entry.is_folder:
                if entry.name.startswith("."):
                    yield Skipped(f"{shown}/", "hidden", minor=True)
            elif entry.name.startswith("."):
                yield Skipped(shown, "hidden", minor=True)
            else:
                yield _one_file(ctx, folder / shown, shown, linked=stat.S_ISLNK(entry.status.st_mode))
    finally:
        os.close(top)
    yield from unlisted.skipped


class _Unlisted(Troubles):
    """Folders that could not be entered or listed."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[Skipped] = []

    def add(self, error: OSError, names: list[str]) -> None:
        super().add(error, names)
        mounted = error.errno == errno.EXDEV
        why = "something is mounted there: name it itself" if mounted else f"cannot be listed: {error.strerror}"
        self.skipped.append(Skipped("/".join(names) + "/", why))


def _one_file(ctx: Context, path: Path, shown: str, *, linked: bool) -> Document | Skipped:
    if linked and os.path.isdir(path):  # noqa: PTH112 - Path's raises where the path is too long
        return Skipped(f"{shown}/", "a link to a folder, which is not followed")
    try:
        return Document(shown, _text_of_file(ctx, path, shown), {"path": shown})
    except UnreadableDocument as error:
        return Skipped(shown, str(error), minor=isinstance(error, BinaryFile))


def _text_of_file(ctx: Context, path: Path, name: str) -> str:
    try:
        with ctx.reach.opened(path) as judged:
            status = judged.stat()
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableDocument("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise UnreadableDocument(f"more than {MAX_FILE_BYTES} bytes; split it")
            return document_text(judged.read_bytes(), name)
    except Refused as error:
        raise UnreadableDocument("not a regular file" if "neither" in str(error) else str(error)) from None
    except FileNotFoundError:
        raise UnreadableDocument("a link to a file that does not exist") from None
    except OSError as error:
        raise UnreadableDocument(f"cannot be read: {error.strerror}") from None
