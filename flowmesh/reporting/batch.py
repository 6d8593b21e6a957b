"""The files through which the node and a sending child pass a batch of messages, and what became of each."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from flowmesh.results.safe_files import read_regular, write_atomic

BATCH_FILE = "batch.msgpack"
ANSWERS_FILE = "answers.jsonl"
MAX_BYTES = 16 * 1024**2


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one message."""

    id: str
    error: str = ""
    """Empty: it arrived."""
    refused: bool = False
    """The receiver is there, and did not take this message."""
    retry_after_s: float = 0.0


class Item(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    body: bytes


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    receiver: bytes
    """What the child needs to know besides, as JSON."""
    items: tuple[Item, ...]


def write_batch(folder: Path, batch: Batch) -> None:
    """Raises OSError: it cannot be written."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / ANSWERS_FILE).unlink(missing_ok=True)
    write_atomic(folder / BATCH_FILE, msgspec.msgpack.encode(batch), private=True)


def read_batch(folder: Path) -> Batch:
    return msgspec.msgpack.decode(read_regular(folder / BATCH_FILE, MAX_BYTES), type=Batch)


def add_answer(folder: Path, answer: Answer) -> None:
    """Add one line; each is whole, whatever is killed then."""
    with (folder / ANSWERS_FILE).open("ab") as file:
        file.write(msgspec.json.encode(answer) + b"\n")


def end_batch(folder: Path) -> list[Answer]:
    """What is known of a batch; the batch itself is removed, as it has the receiver's address."""
    with contextlib.suppress(OSError):
        (folder / BATCH_FILE).unlink()
    return read_answers(folder)


def read_answers(folder: Path) -> list[Answer]:
    """What is known so far; nothing where there is no file."""
    found: list[Answer] = []
    with contextlib.suppress(OSError):
        for line in read_regular(folder / ANSWERS_FILE, MAX_BYTES).splitlines():
            with contextlib.suppress(msgspec.DecodeError):
                found.append(msgspec.json.decode(line, type=Answer))
    return found
