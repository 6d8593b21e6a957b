"""The lines of a batch file that are one task's."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Generic, Protocol, TypeVar

from runners.api import BadRequest, Context
from runners.data.openai_batch import BatchFile
from runners.data.shard import Shard
from runners.inference.openai.lines import Line, LineFault, read_line
from runners.inference.vllm_args import Work


class Readable(Protocol):
    """A line that can be served as far as is known without the model."""

    @property
    def key(self) -> str:
        """Of its row."""

    @property
    def work(self) -> tuple[int, int, int]:
        """Upper bounds: bytes of its prompts, tokens of an answer, answers."""


A = TypeVar("A", bound=Readable)
A_co = TypeVar("A_co", bound=Readable, covariant=True)


class LineReader(Protocol[A_co]):
    """Reads lines for one kind of model."""

    def read(self, line: Line) -> A_co:
        """Raises LineFault for a line that cannot be served."""


class Lines(Generic[A]):
    """The lines of a batch file that are this task's, read once for their keys and errors, and again for their prompts.

    Attributes:
        keys: of each line; empty: it cannot be served.
        custom_ids: of each line; None: it has none.
        faults: of the lines that cannot be served.
        work: an upper bound of the others.
    """

    def __init__(self, ctx: Context, file: BatchFile, reader: LineReader[A]) -> None:
        self._file = file
        self._reader = reader
        self.keys: list[str] = []
        self.custom_ids: list[str | None] = []
        self.faults: dict[int, tuple[str, LineFault]] = {}
        self.work: dict[int, tuple[int, int, int]] = {}
        self._images: dict[int, int] = {}
        seen: dict[str, int] = {}
        for number, (where, data) in enumerate(file.lines()):
            ctx.check_cancelled()
            custom_id: str | None = None
            key = ""
            try:
                line = read_line(data)
                custom_id = line.custom_id
                if custom_id in seen:
                    raise LineFault(
                        f"custom_id: {custom_id!r} is that of line {seen[custom_id] + 1}, too; answers are found by it",
                        param="custom_id",
                    )
                seen[custom_id] = number
                asked = reader.read(line)
                key = asked.key
                self.work[number] = asked.work
                self._images[number] = len(getattr(asked, "images", ()))
            except LineFault as fault:
                fault.custom_id = fault.custom_id or custom_id
                custom_id = fault.custom_id
                self.faults[number] = where, fault
            self.keys.append(key)
            self.custom_ids.append(custom_id)
        shard = None if ctx.spec.get("shard") is None else ctx.check(ctx.spec["shard"], Shard, "spec.shard")
        self._mine = range(len(self.keys)) if shard is None else shard.rows(len(self.keys))
        self.keys = [self.keys[number] for number in self._mine]
        self.custom_ids = [self.custom_ids[number] for number in self._mine]
        self.faults = {at: self.faults[number] for at, number in enumerate(self._mine) if number in self.faults}
        self.work = {at: self.work[number] for at, number in enumerate(self._mine) if number in self.work}
        self._images = {at: self._images[number] for at, number in enumerate(self._mine) if number in self.work}

    def asked(self, done: Container[int]) -> Iterator[tuple[int, str, A]]:
        """Each line that can be served and is not `done`: its position, its name in errors, and what it asks for.

        Raises:
            BadRequest: the file was changed since it was read first.
        """
        for number, (where, data) in enumerate(self._file.lines()):
            if number not in self._mine:
                continue
            index = self._mine.index(number)
            if index in done or index in self.faults:
                continue
            asked: A | None
            try:
                asked = self._reader.read(read_line(data))
            except LineFault:
                asked = None
            if asked is None or index >= len(self.keys) or asked.key != self.keys[index]:
                raise BadRequest(f"{where}: was changed while the task ran; send it again")
            yield index, where, asked

    def work_besides(self, done: Container[int]) -> Work:
        """Upper bounds of the work for the lines that are not `done`."""
        left = [each for index, each in self.work.items() if index not in done]
        images = [count for index, count in self._images.items() if index not in done]
        return Work(
            prompts=len(left),
            prompt_bytes=sum(each[0] for each in left),
            new_tokens=max((each[1] for each in left), default=1),
            copies=max((each[2] for each in left), default=1),
            images=sum(images),
            images_of_one=max(images, default=0),
        )
