"""`data.type: openai_batch`: the lines of the files that OpenAI's Batch API and `vllm run-batch` take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runners.api import BadRequest, Context
from runners.data.files import files_of
from runners.data.readers import File, judged
from runners.data.text_files import raw_lines

TYPE = "openai_batch"
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
ENVELOPE = ("custom_id", "method", "url", "body")


class OpenAIBatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={
    "timeout_s": "timeoutSec"
}):  # fmt: skip
    """spec.data of type openai_batch"""

    type: str
    path: str | None = None
    url: str | None = None
    headers: dict[str, str] | None = None
    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    served_model_name: str | tuple[str, ...] | None = None
    """Names that lines may give the task's model, besides its own; the first one is in the answers."""
    endpoint: Endpoint | None = None
    """Which lines are answered where a file has both kinds: embeddings, or chats and completions. Default: the kind of
    the first line."""


class BatchFile:
    """A batch file, open: what it holds stays the same file while it is read, even if its name is taken by another."""

    def __init__(self, files: list[File]) -> None:
        self._files = files

    def lines(self) -> Iterator[tuple[str, bytes | None]]:
        """Each line that is not blank, with its name in errors. None: it is too long to be read. May be called again.

        Raises:
            BadRequest: the file is not UTF-8 text, or its compressed data are damaged.
        """
        for file in self._files:
            for number, data in enumerate(raw_lines(file.path, file.where), start=1):
                if data is None or data.strip():
                    yield f"{file.where} line {number}", data

    def check(self) -> None:
        """Raises BadRequest if the first line shows that this is another kind of file, or if there is no line."""
        where, data = next(self.lines(), (self._files[0].where, b""))
        if data == b"":
            raise BadRequest(f"{where}: holds no line; a batch file has one request a line")
        try:
            first = msgspec.json.decode(data or b"null")
        except (msgspec.DecodeError, UnicodeDecodeError):
            return  # an error of its line
        if isinstance(first, dict) and set(ENVELOPE) & set(first):
            return
        raise BadRequest(
            f"{where}: not a line of a batch file, which is an object with {', '.join(ENVELOPE)}; "
            "for rows with prompts use data.type jsonl"
        )


@contextlib.contextmanager
def opened(ctx: Context, section: dict[str, Any], where: str) -> Iterator[tuple[OpenAIBatch, BatchFile]]:
    """The source's fields, and its file.

    Raises:
        BadRequest: naming the field.
        RunnerError: the server cannot be reached.
    """
    data = ctx.check(section, OpenAIBatch, where)
    with contextlib.ExitStack() as stack:
        yield data, BatchFile([stack.enter_context(judged(file)) for file in files_of(ctx, data, where)])
