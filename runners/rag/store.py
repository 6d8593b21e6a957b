"""The folder of an index on disk: `index.faiss`, `passages.jsonl`, `index.json`. Written atomically.

Nothing in it is code: FAISS's own format and JSON. It can be packed, moved, and loaded by path, task id or URL.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import faiss
import msgspec

from flowmesh.files.removal import clear
from flowmesh.validation.s3_url import is_url
from runners.api import BadRequest, Context
from runners.models.files import SAFE_ID, downloaded, find_root, opened, task_folder
from runners.models.sources import local_folder, local_path
from runners.rag.documents import Passage
from runners.rag.faiss_check import check_index
from runners.rag.faiss_index import Index, Recipe, loaded
from runners.rag.task import IndexSource

FOLDER = "faiss_index"
"""In the task's folder."""
VECTORS, PASSAGES, ABOUT = "index.faiss", "passages.jsonl", "index.json"
VERSION = 1


class About(msgspec.Struct, frozen=True, kw_only=True):
    """`index.json`"""

    version: int
    recipe: Recipe
    embedding_model: str
    embedding_weights: str | None = None
    """Digest of its files; None: written by an older version."""
    count: int
    chunk_tokens: int
    chunk_overlap: int
    sha256: dict[str, str] | None = None
    """Checksums of `index.faiss` and `passages.jsonl`; None: written by an older version."""


class Loaded(msgspec.Struct, frozen=True):
    """An index with its passages."""

    index: Index
    passages: Passages
    about: About
    folder: Path | None
    """Its folder on disk; None: only in memory."""


class Passages:
    """The passages by row number, decoded on access."""

    def __init__(self, lines: Sequence[bytes], where: str) -> None:
        self._lines = lines
        self._where = where
        self._decoder = msgspec.json.Decoder(Passage)

    @classmethod
    def of(cls, passages: Sequence[Passage]) -> Passages:
        return cls([msgspec.json.encode(each) for each in passages], "the index")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: int) -> Passage:
        try:
            return self._decoder.decode(self._lines[row])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadRequest(f"{self._where}: {PASSAGES} line {row + 1} is not a passage: {error}") from None

    @property
    def digest(self) -> str:
        found = hashlib.blake2b(digest_size=16)
        for line in self._lines:
            found.update(line + b"\n")
        return found.hexdigest()

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            file.writelines(line + b"\n" for line in self._lines)


def save(ctx: Context, built: Loaded, folder: Path | None = None) -> Path:
    """Write the index into the task's folder and ask for its upload.

    Args:
        folder: a merged child's, which is uploaded with the child's results; None: the task's.
    """
    own = ctx.out_dir if folder is None else folder
    target = own / FOLDER
    scratch = own / f".{FOLDER}.partial"
    clear(scratch)
    scratch.mkdir(parents=True)
    faiss.write_index(built.index.on_cpu(), os.fspath(scratch / VECTORS))
    built.passages.write(scratch / PASSAGES)
    sums = {name: _checksum(ctx, scratch / name) for name in (VECTORS, PASSAGES)}
    about = msgspec.structs.replace(built.about, sha256=sums)
    (scratch / ABOUT).write_bytes(msgspec.json.format(msgspec.json.encode(about)))
    clear(target)
    scratch.rename(target)
    if own == ctx.out_dir:
        ctx.archive(FOLDER)
    return target


def load(ctx: Context, wanted: str | IndexSource, where: str) -> Loaded:
    """The index that an earlier task built.

    Raises:
        BadRequest: there is none, or it is damaged.
        RunnerError: its server cannot be reached.
    """
    return read(ctx, locate(ctx, wanted, where), where)


def locate(ctx: Context, wanted: str | IndexSource, where: str) -> Path:
    """The folder of the index on this node, downloaded where it is elsewhere. Errors as for `load`."""
    return _find(ctx, _written_out(wanted, ctx, where), where)


def read(ctx: Context, folder: Path, where: str) -> Loaded:
    """The index in `folder`, or in the only folder below it that holds one.

    Raises:
        BadRequest: there is none, or it is damaged.
    """
    folder = find_root(folder, VECTORS, "index", where)
    local_folder(ctx, folder, folder.name, where)
    try:
        about = msgspec.json.decode((folder / ABOUT).read_bytes(), type=About)
    except FileNotFoundError:
        raise BadRequest(f"{where}: the index has no {ABOUT}; a rag task with faiss.save writes one") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{where}: the index's {ABOUT} cannot be read: {error}") from None
    if about.version != VERSION:
        raise BadRequest(f"{where}: an index of version {about.version}; this node reads version {VERSION}")
    if not _as_saved(ctx, folder, VECTORS, about):
        raise BadRequest(f"{where}: {VECTORS} is not the file that was saved: its checksum differs")
    try:
        vectors = faiss.read_index(os.fspath(folder / VECTORS))
    except RuntimeError as error:
        raise BadRequest(f"{where}: {VECTORS} is not an index of FAISS: {str(error).splitlines()[0][:200]}") from None
    try:
        lines = (folder / PASSAGES).read_bytes().splitlines()
    except FileNotFoundError:
        raise BadRequest(f"{where}: the index has no {PASSAGES}") from None
    if not vectors.ntotal == len(lines) == about.count or vectors.d != about.recipe.dimension:
        raise BadRequest(
            f"{where}: the index is damaged: {vectors.ntotal} vectors of {vectors.d} dimensions and {len(lines)} "
            f"passages, where {ABOUT} says {about.count} of {about.recipe.dimension}"
        )
    if not _as_saved(ctx, folder, PASSAGES, about):
        raise BadRequest(f"{where}: {PASSAGES} is not the file that was saved: its checksum differs")
    if about.count == 0:
        raise BadRequest(f"{where}: the index is empty, there is nothing to find in it")
    check_index(ctx, vectors, about.recipe, f"{where}: {VECTORS}")
    return Loaded(loaded(ctx, vectors, about.recipe), Passages(lines, where), about, folder)


def _as_saved(ctx: Context, folder: Path, name: str, about: About) -> bool:
    wanted = (about.sha256 or {}).get(name)
    return wanted is None or wanted == _checksum(ctx, folder / name)


def _checksum(ctx: Context, path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            ctx.check_cancelled()
            found.update(piece)
    return found.hexdigest()


def is_index(path: Path) -> bool:
    """Whether `path` is the folder of an index, or of a task that saved one."""
    return (path / VECTORS).is_file() or (path / FOLDER / VECTORS).is_file()


def _written_out(wanted: str | IndexSource, ctx: Context, where: str) -> IndexSource:
    """A bare string is a URL, an existing path, or else a task id."""
    if isinstance(wanted, IndexSource):
        return wanted
    if is_url(wanted):
        return IndexSource(url=wanted)
    if not local_path(ctx, wanted, where).exists() and SAFE_ID.fullmatch(wanted):
        return IndexSource(task_id=wanted)
    return IndexSource(path=wanted)


def _find(ctx: Context, wanted: IndexSource, where: str) -> Path:
    archive_format = wanted.archive_format or "auto"
    given = [name for name in ("path", "task_id", "url") if getattr(wanted, name) is not None]
    if len(given) != 1:
        raise BadRequest(f"{where}: give one of `path`, `taskId` and `url`")
    if wanted.url is not None:
        return downloaded(
            ctx, wanted.url, archive_format, f"{where}.url", headers=wanted.headers, timeout_s=wanted.timeout_s
        )
    if wanted.path is not None:
        path = local_path(ctx, wanted.path, where)
        if not path.exists():
            raise BadRequest(f"{where}: there is no {wanted.path!r} on this node")
        return opened(ctx, path, archive_format, where)
    assert wanted.task_id is not None, "one of the three is given"
    folder = task_folder(ctx, wanted.task_id, where)
    if folder is None or not (folder / FOLDER).is_dir():
        raise BadRequest(
            f"{where}: this node has no index of a task {wanted.task_id!r}; "
            "that task must have run here with faiss.save, or give the URL of its faiss_index.tar.gz"
        )
    return folder / FOLDER
