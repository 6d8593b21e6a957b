"""`spec.data` of the training types as structs: one for each shape of rows, with its columns."""

from __future__ import annotations

from typing import Any

import msgspec

from runners.api import BadRequest
from runners.training.settings import Count, Jsonl, Section


class Column(msgspec.Struct, frozen=True):
    """One column of a row. `role` is the trainer's name of it."""

    role: str
    name: str
    """Its name in the data."""
    setting: str
    """The task's field that sets the name, for errors."""
    required: bool = True


class Data(Section, frozen=True):
    """Fields of all shapes: a hub dataset, local folder or file; and JSONL."""

    dataset_name: str | None = None
    config_name: str | None = None
    split: str = "train"
    revision: str | None = None
    max_samples: Count | None = None
    jsonl_path: str | None = None
    """Short for jsonl.path."""
    eval: dict[str, Any] | None = None
    """Rows to evaluate on: a section with the same fields."""
    eval_split: float | str | None = None
    """A share of the rows to hold out for evaluation (0 to 1), or another split of dataset_name."""

    @property
    def inline(self) -> tuple[str, list[Any]] | None:
        """Name and rows of the field with inline rows."""
        return None

    def jsonl_source(self) -> Jsonl | None:
        given = getattr(self, "jsonl", None)
        if self.jsonl_path is None:
            return given
        if given is not None:
            raise BadRequest("spec.data.jsonl_path: short for data.jsonl.path, and data.jsonl is given too; give one")
        return Jsonl(path=self.jsonl_path)

    def columns(self, *, jsonl: bool) -> list[Column]:
        """The columns of a row of JSONL or of a dataset."""
        raise NotImplementedError


def choose(data: Data) -> str:
    """The task's source of rows: inline, jsonl or dataset.

    Raises:
        BadRequest: none, or more than one.
    """
    given = []
    if data.inline is not None:
        given.append(("inline", f"spec.data.{data.inline[0]}"))
    if data.jsonl_source() is not None:
        given.append(("jsonl", "spec.data.jsonl_path" if data.jsonl_path else "spec.data.jsonl"))
    if data.dataset_name is not None:
        given.append(("dataset", "spec.data.dataset_name"))
    if len(given) > 1:
        raise BadRequest(f"{given[0][1]} and {given[1][1]} are both given; give one source of data")
    if not given:
        inline = [name for name in INLINE if name in type(data).__struct_fields__]
        raise BadRequest(f"spec.data: no data; give one of {', '.join(['dataset_name', 'jsonl', *inline])}")
    return given[0][0]


INLINE = ("prompts", "messages", "preferences", "examples")


class TextJsonl(Jsonl, frozen=True):
    text_field: str | None = None
    prompt_field: str | None = None
    response_field: str | None = None
    separator: str | None = None


class TextData(Data, frozen=True):
    jsonl: TextJsonl | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    separator: str = "\n\n"
    text_field: str | None = None
    prompts: list[str] | None = None
    """Whole texts to train on."""
    messages: list[Any] | None = None
    """Chat rows: each a list of {role, content}."""

    @property
    def inline(self) -> tuple[str, list[Any]] | None:
        if self.prompts is not None and self.messages is not None:
            raise BadRequest("spec.data.prompts and spec.data.messages are both given; give one source of data")
        if self.prompts is not None:
            return "prompts", [{"text": text} for text in self.prompts]
        if self.messages is not None:
            return "messages", [row if isinstance(row, dict) else {"messages": row} for row in self.messages]
        return None

    def separator_of(self, *, jsonl: bool) -> str:
        own = self.jsonl.separator if jsonl and self.jsonl is not None else None
        return self.separator if own is None else own

    def columns(self, *, jsonl: bool) -> list[Column]:
        if self.inline is not None:
            role = "messages" if self.messages is not None else "text"
            return [Column(role, role, f"spec.data.{self.inline[0]}")]
        where, prompt, response, text = "spec.data", self.prompt_column, self.response_column, self.text_field
        names = ("prompt_column", "response_column")
        if jsonl and self.jsonl is not None:
            where, names = "spec.data.jsonl", ("prompt_field", "response_field")
            prompt = self.jsonl.prompt_field or prompt
            response = self.jsonl.response_field or response
            text = self.jsonl.text_field or text
        if (prompt is None) != (response is None):
            there, missing = (names[0], names[1]) if response is None else (names[1], names[0])
            raise BadRequest(f"{where}.{missing}: missing; {there} needs it, since both make the text together")
        if prompt is not None and response is not None:
            if text is not None:
                raise BadRequest(f"{where}.text_field: given besides {names[0]}; the text is one or the other")
            return [
                Column("prompt", prompt, f"{where}.{names[0]}"),
                Column("response", response, f"{where}.{names[1]}"),
            ]
        return [Column("text", text or "text", f"{where}.text_field")]


class PreferenceJsonl(Jsonl, frozen=True):
    prompt_field: str = "prompt"
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"


class PreferenceData(Data, frozen=True):
    jsonl: PreferenceJsonl | None = None
    preferences: list[dict[str, Any]] | None = None
    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"

    @property
    def inline(self) -> tuple[str, list[Any]] | None:
        return None if self.preferences is None else ("preferences", self.preferences)

    def columns(self, *, jsonl: bool) -> list[Column]:
        """The prompt may be missing: of reward's rows always, of dpo's where chats begin with it."""
        prompt, *rest = _named(self, ("prompt", "chosen", "rejected"), self.jsonl if jsonl else None)
        return [msgspec.structs.replace(prompt, required=False), *rest]


class ExampleJsonl(Jsonl, frozen=True):
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    label_field: str = "label"


class ExampleData(Data, frozen=True):
    jsonl: ExampleJsonl | None = None
    examples: list[dict[str, Any]] | None = None
    """Rows of {prompt, completion, label: true for a good completion}."""
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    label_column: str = "label"

    @property
    def inline(self) -> tuple[str, list[Any]] | None:
        return None if self.examples is None else ("examples", self.examples)

    def columns(self, *, jsonl: bool) -> list[Column]:
        return _named(self, ("prompt", "completion", "label"), self.jsonl if jsonl else None)


class QueryJsonl(Jsonl, frozen=True):
    query_field: str = "query"
    response_field: str | None = None
    """The reference answer, for rewards that compare with one."""


class PromptData(Data, frozen=True):
    jsonl: QueryJsonl | None = None
    prompts: list[Any] | None = None
    """Texts, chats, or mappings with `prompt` and the columns that rewards read."""
    prompt_column: str = "prompt"
    response_column: str | None = None

    @property
    def inline(self) -> tuple[str, list[Any]] | None:
        if self.prompts is None:
            return None
        return "prompts", [row if isinstance(row, dict) else {"prompt": row} for row in self.prompts]

    def columns(self, *, jsonl: bool) -> list[Column]:
        if self.inline is not None:
            return [Column("prompt", "prompt", "spec.data.prompts"), *self._reference("spec.data")]
        if jsonl:
            given = self.jsonl or QueryJsonl()
            response = given.response_field
            found = [Column("prompt", given.query_field, "spec.data.jsonl.query_field")]
            return [*found, Column("response", response, "spec.data.jsonl.response_field")] if response else found
        return [Column("prompt", self.prompt_column, "spec.data.prompt_column"), *self._reference("spec.data")]

    def _reference(self, where: str) -> list[Column]:
        return [Column("response", self.response_column, f"{where}.response_column")] if self.response_column else []


def _named(data: Data, roles: tuple[str, ...], jsonl: Jsonl | None) -> list[Column]:
    """Columns named by `<role>_field` for JSONL, else by `<role>_column`."""
    if data.inline is not None:
        return [Column(role, role, f"spec.data.{data.inline[0]}") for role in roles]
    if jsonl is not None:
        return [Column(role, getattr(jsonl, f"{role}_field"), f"spec.data.jsonl.{role}_field") for role in roles]
    return [Column(role, getattr(data, f"{role}_column"), f"spec.data.{role}_column") for role in roles]
