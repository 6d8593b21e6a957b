"""A line of a batch file that asks for embeddings: its body, and its answer in OpenAI's and vLLM's shape."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from runners.embedding.embedder import Input, Vectors
from runners.inference.openai.bodies import read_body
from runners.inference.openai.lines import EMBEDDINGS, Line, LineFault
from runners.inference.openai.requests import check_model
from runners.models.spec import Section
from runners.rows.keys import key_of

MOST_INPUTS = 2048
"""Of one line; OpenAI's limit."""


class EmbeddingBody(Section, frozen=True, kw_only=True):
    """Of /v1/embeddings."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None


class AskedVectors(msgspec.Struct, frozen=True, kw_only=True):
    """A line that can be served as far as is known without the model. See `file_lines.Readable`."""

    line: Line
    inputs: tuple[Input, ...]
    one: bool
    """`input` is a single text, or a single list of token ids."""
    as_base64: bool
    dimensions: int | None
    model: str
    """Its name in the answer."""
    key: str

    @property
    def work(self) -> tuple[int, int, int]:
        return len(msgspec.json.encode(self.inputs)), 0, 1

    def field(self, number: int) -> str:
        """What the input with this number is called in errors."""
        return "body.input" if self.one else f"body.input[{number}]"


class EmbeddingReader:
    """Reads lines as requests for embeddings.

    Args:
        names: of the task's model; the first one is in the answers.
        identity: of the model, for the keys of rows.
    """

    def __init__(self, names: Sequence[str], identity: str) -> None:
        self._names = names
        self._identity = identity

    def read(self, line: Line) -> AskedVectors:
        """Raises LineFault for a line that cannot be served."""
        if line.url != EMBEDDINGS:
            raise LineFault(
                f"url: this task's model embeds texts, as the file's first line or spec.data.endpoint asks, and cannot "
                f"serve {line.url} as well; put these lines into a file of their own, for a task with a model that "
                "generates text",
                param="url",
            )
        body: EmbeddingBody = read_body(line.body, EmbeddingBody)
        check_model(body.model, self._names)
        inputs, one = inputs_of(body.input)
        as_base64 = body.encoding_format == "base64"
        key = key_of("openai_batch", line.url, inputs, as_base64, body.dimensions, self._identity)
        return AskedVectors(
            line=line, inputs=inputs, one=one, as_base64=as_base64, dimensions=body.dimensions,
            model=self._names[0], key=key,
        )  # fmt: skip


def inputs_of(given: Any) -> tuple[tuple[Input, ...], bool]:
    """The inputs of a body, and whether it is a single one.

    Raises:
        LineFault: there is none or too many, or one is neither a text nor a list of token ids.
    """
    one = isinstance(given, str) or (bool(given) and all(_is_id(each) for each in given))
    inputs: Sequence[Any] = [given] if one else given
    if not inputs:
        raise LineFault("body.input: is empty", param="input")
    if len(inputs) > MOST_INPUTS:
        raise LineFault(f"body.input: {len(inputs)} inputs; a line takes {MOST_INPUTS}; split it", param="input")
    found: list[Input] = []
    for number, each in enumerate(inputs):
        if isinstance(each, str) and each:
            found.append(each)
        elif isinstance(each, list) and each and all(_is_id(token) for token in each):
            found.append(tuple(each))
        else:
            where = "body.input" if one else f"body.input[{number}]"
            raise LineFault(f"{where}: expected a text or a list of token ids, not empty", param="input")
    return tuple(found), one


def answer(asked: AskedVectors, vectors: Vectors, tokens: int) -> dict[str, Any]:
    """The body of a line's answer.

    Args:
        vectors: one row for each of its inputs.
        tokens: of all inputs.
    """
    shown: list[Any] = vectors.tolist()
    if asked.as_base64:
        shown = [base64.b64encode(each.astype("<f4").tobytes()).decode("ascii") for each in vectors]
    return {
        "id": f"embd-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": asked.model,
        "data": [{"index": index, "object": "embedding", "embedding": each} for index, each in enumerate(shown)],
        "usage": {
            "prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
    }  # fmt: skip


def cut(vectors: Vectors, dimensions: int | None, *, normalized: bool) -> Vectors:
    """The first `dimensions` numbers of each vector; of unit length again where the model's vectors are."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    shorter = vectors[:, :dimensions]
    if not normalized:
        return shorter
    lengths = np.linalg.norm(shorter, axis=1, keepdims=True)
    unit: Vectors = shorter / np.maximum(lengths, 1e-12)
    return unit


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
