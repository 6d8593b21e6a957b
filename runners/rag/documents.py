"""The passages of an index: a task's documents read, cut, and given ids and payloads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.validation.convert import nearest
from runners.api import BadRequest, Context
from runners.data.prompts import Items
from runners.data.sources import LOADERS
from runners.models.sources import local_path
from runners.rag.chunks import Window, split, token_offsets

SUFFIXES = (".txt", ".md", ".rst", ".text", ".markdown")
BATCH_DOCUMENTS = 256
MAX_FILE_BYTES = 64 * 2**20


class Passage(msgspec.Struct, frozen=True):
    """What an index knows of one vector; the payload of a hit."""

    id: str
    text: str
    document: str
    """Which document it is from: the id in its metadata, its path, or its number."""
    chunk: int
    """Which of the document's passages, from 0."""
    metadata: dict[str, Any] | None = None


class Document(msgspec.Struct, frozen=True):
    id: str
    text: str
    metadata: dict[str, Any] | None


def read_documents(ctx: Context, section: dict[str, Any] | None, path: str | None, where: str) -> list[Document]:
    """The documents of `faiss.documents` or `faiss.path`.

    Raises:
        BadRequest: there are none, or one is no text.
    """
    if section is not None:
        return _of_source(load_source(ctx, section, f"{where}.documents"), f"{where}.documents")
    assert path is not None, "one of the two is given"
    return list(_of_path(local_path(ctx, path), path, f"{where}.path"))


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
    return LOADERS[kind](ctx, section, None, ctx.spec, where)


def text_of(prompt: Any, where: str) -> str:
    """A row as one text.

    Raises:
        BadRequest: it is a chat.
    """
    if not isinstance(prompt, str):
        raise BadRequest(f"{where}: chat messages cannot be embedded; give one text")
    return prompt


def cut_documents(ctx: Context, documents: list[Document], tokenizer: Any, cut: Window) -> list[Passage]:
    """The passages of all documents, in order.

    Raises:
        Cancelled: the node asked the task to stop.
    """
    passages: list[Passage] = []
    for first in range(0, len(documents), BATCH_DOCUMENTS):
        ctx.check_cancelled()
        batch = documents[first : first + BATCH_DOCUMENTS]
        for document, offsets in zip(batch, token_offsets(tokenizer, [each.text for each in batch]), strict=True):
            texts = split(document.text, offsets, cut)
            for chunk, text in enumerate(texts):
                name = document.id if len(texts) == 1 else f"{document.id}#{chunk}"
                passages.append(Passage(name, text, document.id, chunk, document.metadata))
    return passages


def _of_source(items: Items, where: str) -> list[Document]:
    documents = []
    seen: dict[str, str] = {}
    for index, (prompt, metadata, place) in enumerate(zip(items.prompts, items.metadata, items.wheres, strict=True)):
        own = (metadata or {}).get("id")
        name = str(own) if isinstance(own, str | int) and not isinstance(own, bool) else str(index)
        if name in seen:
            raise BadRequest(f"{place}: its id {name!r} is also that of {seen[name]}; ids in metadata must differ")
        seen[name] = place
        documents.append(Document(name, text_of(prompt, place), metadata))
    if not documents:
        raise BadRequest(f"{where}: no documents there")
    return documents


def _of_path(path: Path, shown: str, where: str) -> Iterator[Document]:
    if path.is_file():
        yield _of_file(path, path.name, where)
        return
    if not path.is_dir():
        raise BadRequest(f"{where}: there is no file or folder {shown!r} on this node")
    files = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file())
    if not files:
        raise BadRequest(
            f"{where}: {shown!r} has no text files ({', '.join(SUFFIXES)}); "
            "rows of a table are for `documents`, an index has to hold index.faiss"
        )
    for each in files:
        yield _of_file(each, each.relative_to(path).as_posix(), where)


def _of_file(path: Path, name: str, where: str) -> Document:
    if path.suffix.lower() not in SUFFIXES:
        raise BadRequest(f"{where}: {name!r} is no text file ({', '.join(SUFFIXES)}); rows are for `documents`")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise BadRequest(f"{where}: {name!r} has more than {MAX_FILE_BYTES} bytes; split it")
    try:
        return Document(name, path.read_text(encoding="utf-8-sig"), {"path": name})
    except UnicodeDecodeError as error:
        raise BadRequest(f"{where}: {name!r} is not UTF-8 text ({error.reason} at byte {error.start})") from None
