"""A line of a batch file as requests to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from runners.api import BadRequest
from runners.data.content import ImagePart
from runners.data.images import Images
from runners.inference.engine import Engine, Request
from runners.inference.engines import check_ids
from runners.inference.openai.bodies import UNBOUNDED, Body, ChatBody, CompletionBody, Defaults, read_body, sampling
from runners.inference.openai.lines import EMBEDDINGS, Line, LineFault
from runners.inference.openai.prompts import Prompts, body_images
from runners.inference.options import Sampling
from runners.inference.routing import ends_of
from runners.inference.tokens import Texts
from runners.models.adapters import LocalAdapter
from runners.models.limits import check_token_ids
from runners.rows.keys import key_of

UNKNOWN_TOKENS = 512
"""What an answer without a limit is taken to have, where the work is estimated."""
UNKNOWN_ROOM = 512
"""`max_tokens` of a chat that gives none, for a model whose number of positions is not known."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A line that can be served as far as is known without the model."""

    line: Line
    body: Body
    sampling: Sampling
    adapter: str | None
    model: str
    """Its name in the answer."""
    key: str
    images: tuple[ImagePart, ...] = ()
    """Of its messages."""
    tools: tuple[dict[str, Any], ...] = ()
    """That the model may call."""

    @property
    def work(self) -> tuple[int, int, int]:
        """See `Readable`. The bytes of the prompts are about right."""
        body, most = self.body, self.sampling.max_tokens
        given = body.messages if isinstance(body, ChatBody) else body.prompt if isinstance(body, CompletionBody) else ""
        return len(msgspec.json.encode(given)), UNKNOWN_TOKENS if most == UNBOUNDED else most, self.sampling.n


class Reader:
    """Reads lines as requests.

    Args:
        names: of the task's model; the first one is in the answers.
        adapters: those that lines may name as their model, by name, with their digests.
        identity: of the model, for the keys of rows.
        parser: of reasoning.
        images: reads those that lines name; None: they may name none.
    """

    def __init__(  # noqa: PLR0917
        self,
        names: Sequence[str],
        adapters: dict[str, str],
        defaults: Defaults,
        identity: str,
        parser: str | None,
        images: Images | None = None,
    ) -> None:
        self._images = images
        self._names = names
        self._adapters = adapters
        self._defaults = defaults
        self._identity = identity
        self._parser = parser

    def read(self, line: Line) -> Asked:
        """Raises LineFault for a line that cannot be served."""
        if line.url == EMBEDDINGS:
            raise LineFault(
                "url: this task's model generates text, and one engine cannot embed as well; put these lines into a "
                "file of their own, for a task with an embedding model",
                param="url",
            )
        chat = line.url == "/v1/chat/completions"
        body: Body = read_body(line.body, ChatBody if chat else CompletionBody)
        model = check_model(body.model, self._names, self._adapters)
        adapter = model if model in self._adapters else None
        asked = sampling(body, self._defaults)
        content = {
            name: value
            for name, value in msgspec.structs.asdict(body).items()
            if name in PROMPT_FIELDS and value is not None
        }
        images = tuple(body_images(body, self._images)) if isinstance(body, ChatBody) else ()
        key = key_of(
            "openai_batch", line.url, content, asked, self._identity, self._parser, adapter and self._adapters[adapter],
            *([[each.digest for each in images]] if images else []),
        )  # fmt: skip
        name = adapter or self._names[0]
        return Asked(line=line, body=body, sampling=asked, adapter=adapter, model=name, key=key, images=images)


def check_model(given: str | None, names: Sequence[str], adapters: Sequence[str] | dict[str, str] = ()) -> str:
    """The name that a line gives the model or an adapter; absent: the first of `names`.

    Raises:
        LineFault: it names another model.
    """
    model = given or names[0]
    if model not in names and model not in adapters:
        known = ", ".join(map(repr, (*names, *adapters)))
        raise LineFault(
            f"body.model: {model!r} is not the task's model ({known}); correct it, or add it to "
            "spec.data.served_model_name",
            param="model",
            status=404,
        )
    return model


PROMPT_FIELDS = frozenset({
    "messages", "prompt", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "reasoning_effort",
    "include_reasoning", "add_special_tokens",
})  # fmt: skip
"""Fields that determine an answer beside its sampling."""


def requests_of(
    asked: Asked, prompts: Prompts, engine: Engine, texts: Texts, adapters: Sequence[LocalAdapter]
) -> list[Request]:
    """The requests of one line: one for each of its prompts.

    Raises:
        LineFault: a prompt does not fit the model or its chat template, or the engine cannot honour its sampling.
    """
    body, wanted = asked.body, asked.sampling
    if isinstance(body, ChatBody):
        token_ids, pictures = prompts.chat(body, asked.images, asked.tools)
        field, encoded = "body.messages", [token_ids]
    else:
        assert isinstance(body, CompletionBody)
        field, encoded, pictures = "body.prompt", prompts.completions(body), None
    try:
        check_ids(wanted, engine, texts, "body")
        engine.check(wanted, "body")
        for token_ids in encoded:
            check_token_ids(token_ids, engine.vocabulary, texts.tokenizer, field)
    except BadRequest as error:
        message = str(error).replace("body.json_schema", "body.response_format")
        raise LineFault(message, param=message.removeprefix("body.").partition(":")[0]) from None
    found = []
    for token_ids in encoded:
        room = UNKNOWN_ROOM if engine.max_positions is None else engine.max_positions - len(token_ids)
        if room < 1:
            raise LineFault(
                f"{field}: the prompt has {len(token_ids)} tokens; the model takes {engine.max_positions} with the "
                "answer; shorten it",
                param=field.removeprefix("body."),
            )
        most = wanted.max_tokens
        if most == UNBOUNDED or engine.max_positions is not None:
            most = min(most, room)
        if wanted.min_tokens > most:
            raise LineFault(
                f"body.min_tokens: {wanted.min_tokens}, but there is room for {most} tokens", param="min_tokens"
            )
        own: Any = msgspec.structs.replace(wanted, max_tokens=most)
        found.append(Request(token_ids, own, asked.adapter, ends_of(adapters, asked.adapter), pictures))
    return found
