"""The memory that a fork server shares with its children, page by page.

A fork and an exit take time for each page there is, so the server puts what it has into large pages. A child's first
write to a shared page takes a fault and a copy; which pages those are is the same for all children, so a child that
waits for its task can have them copied beforehand, many at once.
"""

from __future__ import annotations

import array
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_LARGE_BYTES = 2 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PRESENT = 1 << 63
_EITHER = _PRESENT | 1 << 56
"""Present, and mapped by nobody else."""
_ENTRY_BYTES = 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]

Span = tuple[int, int]
"""The first page's number and how many follow each other."""


def into_large() -> Iterator[bool]:
    """Put our own private memory into large pages, one a step; nothing where the kernel (before 6.1) cannot.

    What cannot be moved stays as it is: a part that is empty, or for which there is no large page free.
    """
    for start, end, inode in _writable():
        if inode:
            continue
        first = -(-start // _LARGE_BYTES) * _LARGE_BYTES
        for at in range(first, end - _LARGE_BYTES + 1, _LARGE_BYTES):
            _libc.madvise(at, _LARGE_BYTES, _MADV_COLLAPSE)
            yield True


class Writes:
    """Watches which shared pages the calling process, a fork of another, writes to from now on."""

    def __init__(self) -> None:
        self._before = [(start // _PAGE, _entries(start, end - start)) for start, end, _ in _writable()]

    def so_far(self) -> list[Span]:
        """Those that were shared then, and are its own now."""
        spans: list[Span] = []
        for first, before in self._before:
            now = _entries(first * _PAGE, len(before) * _PAGE)
            for page, pair in enumerate(zip(before, now, strict=False), first):
                if [entry & _EITHER for entry in pair] != [_PRESENT, _EITHER]:
                    continue
                if spans and sum(spans[-1]) == page:
                    spans[-1] = (spans[-1][0], spans[-1][1] + 1)
                else:
                    spans.append((page, 1))
        return spans


def make_own(span: Span) -> None:
    """Have a private copy of these pages, as if they had been written to; where that cannot be, they stay shared."""
    _libc.madvise(span[0] * _PAGE, span[1] * _PAGE, _MADV_POPULATE_WRITE)


def _writable() -> list[tuple[int, int, int]]:
    """Start, end and inode (0: none) of each private writable mapping but the stack."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights[1] == "w" and rights[3] == "p" and name != ["[stack]"]:
            start, end = span.split("-")
            found.append((int(start, 16), int(end, 16), int(inode)))
    return found


def _entries(start: int, size: int) -> array.array[int]:
    """What the kernel says of each page there."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        return array.array("Q", os.pread(pagemap.fileno(), size // _PAGE * _ENTRY_BYTES, start // _PAGE * _ENTRY_BYTES))
