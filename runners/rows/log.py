"""The row log of one task: each finished item is on disk before the next one is waited for."""

from __future__ import annotations

import fcntl
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowmesh.messages.rows import ROWS_FILE, Counts, Head, Kept, Row, line, read
from runners.api import Context, RunnerError


class RowLog:
    """Appends to `rows.jsonl` in a task's folder; the only writer of it.

    A row is written with one system call when it is added, so a killed process loses no finished row. The position is
    explicit: a write that a signal interrupted is repeated at the same place, not appended twice.

    Raises (from its methods):
        OSError: the file cannot be written.
    """

    def __init__(
        self, folder: Path, keys: Sequence[str], *, field: str = "items", fresh: bool = False, document: str = "",
        redact: Callable[[dict[str, Any]], dict[str, Any]] = lambda item: item,
    ) -> None:  # fmt: skip
        """
        Args:
            folder: the task's.
            keys: of the task's items, in order; empty: the item is computed by every attempt.
            field: the list in the result that holds the items.
            fresh: drop the rows of earlier attempts.
            document: from `document_key`: a failed attempt at another document shows no rows of this one.
            redact: hides the task's secrets in an item.

        Raises:
            RunnerError: another process writes the file.
            OSError: it is not a regular file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / ROWS_FILE
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise RunnerError(f"{self._path} is not a regular file; remove it")
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise RunnerError(f"{self._path} is being written by another process") from None
        except BaseException:
            os.close(self._fd)
            raise
        self._keys = keys
        self._occurrences = occurrences(keys)
        self._field = field
        self._document = document
        self._redact = redact
        self._kept = Kept() if fresh else self._read()
        self._at = 0
        self.rows: dict[int, Row] = {}
        """The finished rows, by item."""
        self.reused = 0
        self.reused_tokens = 0
        self.gone = 0
        """Rows that would fit, and do not stand any more."""
        self.unfit = 0
        """Rows of another task that no item of this one has the key of."""

    @property
    def bad_lines(self) -> int:
        """Of the file as it was found; their rows are computed again."""
        return self._kept.bad_lines

    @property
    def counts(self) -> Counts:
        return Counts(done=len(self.rows), total=len(self._keys), reused=self.reused, reused_tokens=self.reused_tokens)

    def take(
        self,
        others: Iterable[Row],
        place: Callable[[int, Row], dict[str, Any]],
        stands: Callable[[int, Row], bool] = lambda *_: True,
    ) -> None:
        """Take over rows of earlier attempts, and then `others` of another task, by their keys; then write on.

        Args:
            place: a row's entry in this task's result, for an item.
            stands: whether a row may be taken over for an item, as far as its key does not say it.
        """
        by_key: dict[tuple[str, int], Row] = {}
        others = list(others)
        for each in (*others, *self._kept.rows):  # the last one counts: this task's own
            if each.key:
                by_key[each.key, each.occurrence] = each
        taken: dict[int, Row] = {}
        for index, (key, occurrence) in enumerate(zip(self._keys, self._occurrences, strict=True)):
            row = by_key.pop((key, occurrence), None) if key else None
            if row is not None and not stands(index, row):
                self.gone += 1
            elif row is not None:
                taken[index] = self._row(
                    index, place(index, row), row.prompt_tokens, row.completion_tokens, files=row.files
                )
        own = {(row.key, row.occurrence) for row in self._kept.rows}
        stale = [
            Row(key=row.key, occurrence=row.occurrence, prompt_tokens=row.prompt_tokens,
                completion_tokens=row.completion_tokens, item=row.item, files=row.files)
            for at, row in by_key.items() if at in own
        ]  # fmt: skip
        self._begin(taken, stale)
        self.rows = taken
        wanted = set(zip(self._keys, self._occurrences, strict=True))
        self.unfit = sum(
            bool(each.key) and each.index is not None and (each.key, each.occurrence) not in wanted for each in others
        )
        self.reused = len(taken)
        self.reused_tokens = sum(row.prompt_tokens + row.completion_tokens for row in taken.values())

    def add(self, index: int, item: Mapping[str, Any], *, prompt_tokens: int = 0, completion_tokens: int = 0,
            again: bool = False, files: str = "") -> Row:  # fmt: skip
        """Write a finished item.

        Args:
            item: its entry in the result, in JSON types.
            again: a retry computes it again, because it failed.
            files: see `Row.files`.
        """
        row = self._row(index, dict(item), prompt_tokens, completion_tokens, again=again, files=files)
        self._append(line(row))
        self.rows[index] = row
        return row

    def items(self) -> list[dict[str, Any]]:
        """The entries of the finished items, in the order of the items."""
        return [self.rows[index].item for index in sorted(self.rows)]

    def __enter__(self) -> RowLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _row(
        self, index: int, item: dict[str, Any], prompt_tokens: int, completion_tokens: int, *, again: bool = False,
        files: str = "",
    ) -> Row:  # fmt: skip
        return Row(
            key="" if again else self._keys[index],
            occurrence=self._occurrences[index],
            index=index,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            item=self._redact(item),
            files=files,
        )

    def _read(self) -> Kept:
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            return read(file)

    def _begin(self, taken: dict[int, Row], stale: list[Row]) -> None:
        """Continue the file where it holds exactly these rows, else write it anew."""
        kept, head = self._kept, Head(total=len(self._keys), field=self._field, document=self._document)
        if kept.head == head and not kept.bad_lines and len(kept.rows) == len(taken) and kept.current == taken:
            os.ftruncate(self._fd, kept.whole_bytes)
            self._at = kept.whole_bytes
            return
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(partial, flags, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old, self._fd, self._at = self._fd, fd, 0
        try:
            self._append(line(head))
            for row in (*stale, *taken.values()):
                self._append(line(row))
            partial.replace(self._path)
        finally:
            os.close(old)

    def _append(self, data: bytes) -> None:
        at = self._at
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, at)
            view, at = view[written:], at + written
        self._at = at


def report_rows(ctx: Context, logs: Iterable[RowLog]) -> None:
    """Put the rows of a task and of its merged children into its outcome."""
    counts = [log.counts for log in logs]
    ctx.rows = Counts(*(sum(getattr(each, name) for each in counts) for name in Counts.__struct_fields__))


def occurrences(keys: Sequence[str]) -> list[int]:
    """For each key, how often it came before."""
    seen: Counter[str] = Counter()
    found = []
    for key in keys:
        found.append(seen[key])
        seen[key] += 1
    return found
