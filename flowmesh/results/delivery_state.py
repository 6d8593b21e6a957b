"""What of a delivery is done already. Kept in the spool folder, so that a delivery that runs again skips it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from flowmesh.messages.text import encode_json
from flowmesh.results.manifest import Known
from flowmesh.results.safe_files import read_note, write_atomic

STATE_FILE = "delivery_state.json"

log = logging.getLogger("flowmesh.delivery")


class Made(msgspec.Struct, frozen=True, array_like=True):
    """A finished archive."""

    size: int
    sha256: str


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """A file that arrived, as it was then."""

    size: int
    mtime_ns: int
    path: str = ""
    sha256: str = ""
    """Of the bytes that were sent; empty in a state that an earlier version wrote."""


class Tries(msgspec.Struct, kw_only=True):
    """The failed attempts at the request that is due."""

    request: str = ""
    """Method and URL, without what may be secret in it."""
    attempts: int = 0
    spent_s: float = 0.0
    """From the first attempt on, waits included."""
    kind: str = ""
    """The last failure's, if failures of its kind have their own limit."""
    kind_since_s: float = 0.0
    """`spent_s` at the first of the latest failures of that kind."""
    last_answer: str = ""


class Multipart(msgspec.Struct, frozen=True, kw_only=True):
    """An upload to S3 in parts that has begun."""

    upload_id: str
    size: int
    mtime_ns: int
    part_bytes: int
    etags: tuple[str, ...] = ()
    """Of the parts that arrived."""


class _Saved(msgspec.Struct, kw_only=True):
    """The content of STATE_FILE."""

    attempt: int
    archives: dict[str, Made] = {}
    """By path."""
    sent: dict[str, Sent] = {}
    """By `Item.key`."""
    results: list[str] = []
    """Ids of the tasks whose result arrived."""
    tries: Tries | None = None
    multiparts: dict[str, Multipart] = {}
    """By the object's address."""
    left_s: float | None = None
    """Of the delivery's time; None: nothing was tried yet."""


class DeliveryState:
    """The state of one attempt's delivery. Each change is saved at once.

    Args:
        attempt: a state of another attempt is ignored.
        spool: the attempt's spool folder; None: nothing is saved.
        task_id: for log lines.
    """

    def __init__(self, attempt: int, spool: Path | None, task_id: str) -> None:
        self._path = None if spool is None else spool / STATE_FILE
        self._task_id = task_id
        saved = None if self._path is None else read_note(self._path, _Saved)
        self._saved = saved if saved is not None and saved.attempt == attempt else _Saved(attempt=attempt)

    def archive(self, path: Path) -> Made | None:
        return self._saved.archives.get(str(path))

    def known(self) -> dict[str, Known]:
        """Content of the archives and of what was sent, by path."""
        known = {path: Known(made.size, made.sha256) for path, made in self._saved.archives.items()}
        sent = (each for each in self._saved.sent.values() if each.sha256)
        return known | {each.path: Known(each.size, each.sha256) for each in sent}

    def archive_made(self, path: Path, size: int, sha256: str) -> None:
        self._saved.archives[str(path)] = Made(size, sha256)
        self._save()

    def is_sent(self, key: str) -> bool:
        """Whether a file of this key arrived, whatever has become of the file since."""
        return key in self._saved.sent

    def has_arrived(self, key: str, now: os.stat_result | None) -> bool:
        """Whether the file arrived and has not changed since.

        Args:
            now: of the file; None: it is missing, as it may have been cleaned up.
        """
        sent = self._saved.sent.get(key)
        if sent is None or now is None:
            return sent is not None
        return (sent.size, sent.mtime_ns) == (now.st_size, now.st_mtime_ns)

    def file_arrived(self, key: str, path: Path, status: os.stat_result, sha256: str) -> None:
        self._saved.sent[key] = Sent(size=status.st_size, mtime_ns=status.st_mtime_ns, path=str(path), sha256=sha256)
        self._save()

    def has_result(self, task_id: str) -> bool:
        return task_id in self._saved.results

    def result_arrived(self, task_id: str) -> None:
        self._saved.results.append(task_id)
        self._save()

    @property
    def begun(self) -> tuple[str, ...]:
        """The objects whose upload in parts has begun."""
        return tuple(self._saved.multiparts)

    def multipart(self, url: str) -> Multipart | None:
        """The upload in parts of this object that has begun."""
        return self._saved.multiparts.get(url)

    def multipart_is(self, url: str, now: Multipart | None) -> None:
        """None: it has ended."""
        if now is None:
            self._saved.multiparts.pop(url, None)
        else:
            self._saved.multiparts[url] = now
        self._save()

    def tries_of(self, request: str) -> Tries:
        """The failed attempts at a request so far."""
        saved = self._saved.tries
        return saved if saved is not None and saved.request == request else Tries(request=request)

    @property
    def left_s(self) -> float | None:
        """What is left of the delivery's time; None: nothing was tried yet."""
        return self._saved.left_s

    def postponed(self, tries: Tries, left_s: float) -> None:
        self._saved.tries, self._saved.left_s = tries, left_s
        self._save()

    def forget_tries(self) -> None:
        """The delivery's time and its attempts begin again; what arrived stays."""
        self._saved.tries = self._saved.left_s = None
        self._save()

    def _save(self) -> None:
        if self._path is None:
            return
        try:
            write_atomic(self._path, encode_json(self._saved), private=True)
        except OSError as error:  # no reason to fail: after a kill some work would be repeated
            log.warning("delivery state not saved task=%s: %s", self._task_id, error.strerror)
