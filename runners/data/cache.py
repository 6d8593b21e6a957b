"""The node's cache, shared by its tasks: downloads by URL, and the caches of libraries. Locked, and bounded in size.

Each entry has two locks. `fetch.lock` is exclusive while a task downloads. `use.lock` is shared by every task that
uses the entry, until its process ends. An entry in use is never deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from flowmesh.files.beneath import FOLDER
from flowmesh.files.removal import remove_path
from flowmesh.files.walk import Troubles, walk
from runners.api import Context

DOWNLOADS = "downloads"
DATASETS = "datasets"
"""Caches of the `datasets` library, one for each dataset name. Local files have none."""
COMPILED = "vllm"
"""Compiled graphs of vLLM, all in one folder."""
KINDS = (DOWNLOADS, DATASETS, COMPILED)
DEFAULT_MAX_BYTES = 200 * 2**30
LOCK_POLL_S = 0.2


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """Metadata of the entry's newest file."""

    url: str
    file: str
    size_bytes: int
    etag: str | None = None
    last_modified: str | None = None


class Lock:
    """A `flock` on a file. Released by `close`, or by the end of the process."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def take(self, *, shared: bool) -> bool:
        """Take or change the lock without waiting; False where others hold it."""
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait(self, ctx: Context, *, shared: bool) -> None:
        """Take the lock; checks for cancellation while it waits.

        Raises:
            Cancelled: the node asked the task to stop.
        """
        while not self.take(shared=shared):
            ctx.sleep(LOCK_POLL_S)

    def is_of(self, path: Path) -> bool:
        """Whether `path` is still the locked file. It may have been deleted and created again."""
        try:
            return os.path.samestat(os.fstat(self._fd), path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        os.close(self._fd)


class Entry:
    """The folder of one URL. Use it as a context manager: it holds `fetch.lock` inside."""

    def __init__(self, ctx: Context, url: str, headers: Mapping[str, str]) -> None:
        # The response depends on the credentials: one entry for each set of headers.
        secret = "\n".join(f"{name.lower()}: {value}" for name, value in sorted(headers.items()))
        self.ctx = ctx
        self.folder = _folder(ctx, DOWNLOADS, f"{url}\n{secret}")
        self.part = self.folder / "part"
        self.part_meta = self.folder / "part.json"
        self._fetching: Lock | None = None

    def __enter__(self) -> Entry:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = Lock(self.folder / "fetch.lock")
            except FileNotFoundError:
                continue  # evicted between the two lines
            lock.wait(self.ctx, shared=False)
            if lock.is_of(self.folder / "fetch.lock"):
                self._fetching = lock
                return self
            lock.close()

    def __exit__(self, *_: object) -> None:
        if self._fetching is not None:
            self._fetching.close()

    def part_bytes(self) -> int:
        """Size of the partial download that an earlier attempt left."""
        return self.part.stat().st_size if self.part.is_file() else 0

    def meta(self) -> Meta | None:
        """Metadata of the complete file, or None."""
        meta = read_meta(self.folder / "meta.json")
        return meta if meta is not None and (self.folder / meta.file).exists() else None

    def publish(self, meta: Meta) -> None:
        """Make `part` the entry's file, and delete older files unless a task uses them."""
        self.part.rename(self.folder / meta.file)
        self.part_meta.unlink(missing_ok=True)
        write_meta(self.folder / "meta.json", meta)
        lock = Lock(self.folder / "use.lock")
        if lock.take(shared=False):
            for each in self.folder.iterdir():
                if each.name.startswith("file-") and not each.name.startswith(meta.file):
                    remove_path(each)
        lock.close()

    def use(self, meta: Meta) -> Path:
        """The entry's file. It is not deleted before this process ends."""
        _hold(self.ctx, self.folder)
        return self.folder / meta.file

    @property
    def is_used(self) -> bool:
        """Whether this process uses it already."""
        return self.folder in _held

    def drop(self) -> None:
        """Give the entry up, once its file has another place; it stays where another task uses it."""
        if (lock := _held.pop(self.folder, None)) is not None:
            lock.close()
        _delete(self.folder)


def library_folder(ctx: Context, kind: str, name: str) -> Path:
    """The cache folder of a library for `name`. It is not deleted before this process ends.

    Raises:
        Cancelled: the node asked the task to stop while it waited for the lock.
    """
    folder = _folder(ctx, kind, name)
    _hold(ctx, folder)
    evict(ctx)
    return folder


def _folder(ctx: Context, kind: str, name: str) -> Path:
    return ctx.cache_dir / kind / hashlib.sha256(name.encode()).hexdigest()


_held: dict[Path, Lock] = {}


def _hold(ctx: Context, folder: Path) -> None:
    """Hold the shared use lock until this process ends, and mark the folder as used now."""
    path = folder / "use.lock"
    while folder not in _held:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(path)
        except FileNotFoundError:
            continue  # evicted between the two lines
        lock.wait(ctx, shared=True)
        if lock.is_of(path):
            _held[folder] = lock
        else:
            lock.close()
    os.utime(folder)


def evict(ctx: Context, *, coming_bytes: int = 0) -> None:
    """Delete least recently used entries until the cache fits `runners.cache_max_bytes`.

    Args:
        coming_bytes: size of a file that is about to be downloaded.
    """
    bound = int(ctx.job.limits.get("cache_max_bytes", DEFAULT_MAX_BYTES))
    entries = []
    for folder in (folder for kind in KINDS for folder in (ctx.cache_dir / kind).glob("*/")):
        try:
            entries.append((folder.stat().st_mtime, size_bytes(folder), folder))
        except FileNotFoundError:
            continue
    total = coming_bytes + sum(size for _, size, _ in entries)
    for _, size, folder in sorted(entries):
        if total <= bound:
            return
        if _delete(folder):
            total -= size
            ctx.log.info("cache entry evicted kind=%s folder=%s bytes=%d", folder.parent.name, folder.name, size)


def _delete(folder: Path) -> bool:
    """Delete an entry unless a task downloads or uses it."""
    locks: list[Lock] = []
    try:
        for name in ("fetch.lock", "use.lock"):
            locks.append(Lock(folder / name))
            if not locks[-1].take(shared=False):
                return False
        return not remove_path(folder)
    except OSError:  # it is gone, or a task made something else of it
        return False
    finally:
        for lock in locks:
            lock.close()


def size_bytes(folder: Path) -> int:
    """Total size of the files below `folder`. Files that vanish during the walk are not counted."""
    try:
        top = os.open(folder, FOLDER)
    except OSError:
        return 0
    try:
        return sum(entry.status.st_size for entry in walk(top, Troubles()) if not entry.is_folder)
    finally:
        os.close(top)


def read_meta(path: Path) -> Meta | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Meta)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def write_meta(path: Path, meta: Meta) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_bytes(msgspec.json.encode(meta))
    scratch.rename(path)
