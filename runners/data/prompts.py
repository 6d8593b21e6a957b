"""Prompts with metadata, which every data source yields."""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence
from typing import Any

import msgspec

from flowmesh.validation.convert import FieldError, convert
from flowmesh.validation.names import kind
from runners.api import BadRequest, Context
from runners.data.content import Part, TextPart, read_content


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One turn of a chat."""

    role: str
    content: str | tuple[Part, ...]
    """The parts where at least one is an image; else its text."""
    reasoning: str | None = None
    """Of an assistant's turn: what it thought. The model's template decides whether the model sees it again."""
    reasoning_content: str | None = None
    """The same, by its older name."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content as a list of parts."""
        return (TextPart(self.content),) if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """The content without its images."""
        return (
            self.content
            if isinstance(self.content, str)
            else "\n".join(part.text for part in self.content if isinstance(part, TextPart))
        )

    @property
    def has_content(self) -> bool:
        """Whether there is more in it than white space."""
        return not isinstance(self.content, str) or bool(self.content.strip())

    def shown(self) -> dict[str, Any]:
        """In JSON types, for the result; the reasoning under both names."""
        content = self.content if isinstance(self.content, str) else [part.shown() for part in self.content]
        return {"role": self.role, "content": content, **self._thought()}

    def templated(self, *, as_parts: bool = False) -> dict[str, Any]:
        """As chat templates take it.

        Args:
            as_parts: also a text is a list of parts.
        """
        if isinstance(self.content, str) and not as_parts:
            return {"role": self.role, "content": self.content, **self._thought()}
        parts = [part.shown() if isinstance(part, TextPart) else {"type": "image"} for part in self.parts]
        return {"role": self.role, "content": parts, **self._thought()}

    def _thought(self) -> dict[str, str]:
        thought = self.reasoning if self.reasoning is not None else self.reasoning_content
        names = () if thought is None else ("reasoning", "reasoning_content")
        return dict.fromkeys(names, thought or "")


Prompt = str | tuple[Message, ...]


class Items(msgspec.Struct, frozen=True):
    """A task's rows, after shuffling and sharding."""

    prompts: tuple[Prompt, ...]
    metadata: tuple[dict[str, Any] | None, ...]
    wheres: tuple[str, ...]
    """The name of each row in errors: `spec.data.items[3]`."""
    system_last: bool = False
    """Whether a system prompt goes after the prompts instead of before them."""

    def at(self, numbers: Sequence[int]) -> Items:
        """The rows with these numbers, in this order."""
        return Items(
            prompts=tuple(self.prompts[i] for i in numbers),
            metadata=tuple(self.metadata[i] for i in numbers),
            wheres=tuple(self.wheres[i] for i in numbers),
            system_last=self.system_last,
        )


def check_prompt(ctx: Context, value: Any, where: str, *, allow_empty: bool) -> Prompt:
    """A row's value as a prompt: a string, chat messages, or strings that are its lines.

    Args:
        allow_empty: for rows of a table: an empty or missing value is an empty prompt, a number its text as written.

    Raises:
        BadRequest: it is neither.
    """
    if allow_empty and (value in (None, [], ()) or (isinstance(value, float) and math.isnan(value))):
        return ""  # spellings of a missing value in a table
    if (lines := lines_of(value)) is not None:
        value = lines
    if isinstance(value, str):
        if not value.strip() and not allow_empty:
            raise BadRequest(f"{where}: is empty; give a prompt or leave the item out")
        return value
    if isinstance(value, list | tuple) and value:
        turns = [
            _read_turn(turn, f"{where}[{i}]") for i, turn in enumerate(value)
        ]  # tables have a cell for every key, also where it says nothing
        return _chat_of_table(turns, where) if allow_empty else ctx.check(turns, tuple[Message, ...], where)
    if allow_empty and isinstance(value, bool):
        return "true" if value else "false"
    if allow_empty and isinstance(value, int | float | decimal.Decimal):
        return str(value)
    found = kind(value) if allow_empty else f"{type(value).__name__} {value!r}"[:80]
    raise BadRequest(f"{where}: expected a string or a list of {{role, content}} messages (found {found})")


def _chat_of_table(turns: list[Any], where: str) -> tuple[Message, ...]:
    """The chat of a file's row, whose content no error shows."""
    try:
        return convert(turns, tuple[Message, ...], where=where)
    except FieldError as error:
        turn, bracket, _ = error.path.removeprefix(where).partition("]")
        raise BadRequest(f"{where}{turn}{bracket}: expected {{role, content}} with two texts and no more") from None


def lines_of(value: Any) -> str | None:
    """The text whose lines are given as a list of strings; None for anything else, an empty list included."""
    if isinstance(value, list | tuple) and value and all(isinstance(each, str) for each in value):
        return "\n".join(value)
    return None


def check_text(value: Any, where: str) -> None:
    """Raises BadRequest for a lone surrogate, which neither a tokenizer nor JSON can encode."""
    try:
        msgspec.json.encode(value, enc_hook=str)
    except UnicodeEncodeError:
        raise BadRequest(
            f"{where}: half a character in its text (a lone surrogate, \\ud800 to \\udfff); fix the text"
        ) from None


def _read_turn(turn: Any, where: str) -> Any:
    """A turn without its nulls, and with its content's parts read."""
    if not isinstance(turn, dict):
        return turn
    given = {key: value for key, value in turn.items() if value is not None}
    if isinstance(given.get("content"), list | tuple):
        content = read_content(given["content"], f"{where}.content")
        given["content"] = content if isinstance(content, str) else msgspec.to_builtins(content)
    return given


def with_system(prompt: Prompt, system: str | None, *, last: bool = False) -> Prompt:
    """`prompt` with the system prompt: before plain text with a newline, or as the system message of a chat.

    The existing system message of a chat is appended to the system prompt.

    Args:
        last: put it after plain text.
    """
    if system is None:
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}\n{system}" if last else f"{system}\n{prompt}"
    if prompt[0].role == "system":
        own = prompt[0].content
        both = f"{system}\n{own}" if isinstance(own, str) else (TextPart(f"{system}\n"), *own)
        return (Message("system", both), *prompt[1:])
    return (Message("system", system), *prompt)


def to_json(prompt: Prompt) -> Any:
    """A prompt in JSON types, for the result."""
    return prompt if isinstance(prompt, str) else [message.shown() for message in prompt]
