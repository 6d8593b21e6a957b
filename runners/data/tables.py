"""Rows of a table as prompts with metadata, for all file formats and `datasets`."""

from __future__ import annotations

import base64
import datetime
import decimal
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flowmesh.validation.json_paths import PathError, parse, walk
from flowmesh.validation.names import listed
from runners.api import BadRequest, Context
from runners.data.content import read_content
from runners.data.json_text import Spelled
from runners.data.prompts import Items, Message, Prompt, check_prompt


class Columns:
    """The column of the prompt, and those of its metadata."""

    def __init__(
        self,
        column: str,
        metadata: Sequence[str] | Mapping[str, str] | None,
        include_all: bool,
        where: str,
        *,
        images: str | None = None,
    ) -> None:
        self.column = column
        self.images = images
        self.include_all = include_all
        self.renamed = dict(metadata) if isinstance(metadata, Mapping) else {name: name for name in metadata or ()}
        self._where = where

    def check(self, there: Iterable[str]) -> None:
        """Raises BadRequest if a column that the task names is missing, or two would share a name in the metadata.

        Args:
            there: the existing columns, which the error lists.
        """
        names = list(there)
        images = [] if self.images is None else [self.images]
        for field, wanted in (
            ("column", [self.column]), ("image_column", images), ("metadata_columns", list(self.renamed)),
        ):  # fmt: skip
            for name in wanted:
                if column_of(name, names) is None:
                    raise BadRequest(f"{self._where}.{field}: no column {name!r}; there are: {listed(names)}")
        called = self._called(names)
        for name, target in called.items():
            twin = next(other for other in called if called[other] == target)
            if twin != name:
                raise BadRequest(
                    f"{self._where}.metadata_columns: {twin!r} and {name!r} would both be called {target!r} in the "
                    "metadata; give one of them another name"
                )

    def check_first(self, where: str, row: Mapping[str, Any]) -> None:
        """Raises BadRequest if a nested metadata column is missing in the first row."""
        for name in self.renamed:
            try:
                cell(row, name)
            except PathError as error:
                raise BadRequest(f"{self._where}.metadata_columns: {name!r} is not in {where}: {error}") from None

    def wanted(self, there: Iterable[str]) -> list[str]:
        """The columns that have to be read, of those in `there`."""
        names = list(there)
        images = () if self.images is None else (self.images,)
        roots = {column_of(name, names) for name in (self.column, *images, *self.renamed)}
        return [name for name in names if self.include_all or name in roots]

    def metadata(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """A row's metadata in JSON types; None if the task asks for none."""
        if not self.renamed and not self.include_all:
            return None
        return {target: plain(_cell_or_none(row, name)) for name, target in self._called(row).items()}

    def _called(self, there: Iterable[str]) -> dict[str, str]:
        """Source column → name in the metadata."""
        names = [name for name in there if name not in (self.column, self.images)] if self.include_all else []
        return {name: name for name in names} | self.renamed


def column_of(name: str, there: Iterable[str]) -> str | None:
    """The column that `name` refers to: an exact match, else the longest column that its path begins with."""
    found = None
    for column in there:
        if column == name:
            return column
        inside = name.startswith(column) and name[len(column)] in ".["
        if column and inside and len(column) > len(found or ""):
            found = column
    return found


def cell(row: Mapping[str, Any], name: str) -> Any:
    """A row's value at `name`: a column, or a path into one such as `body.messages` or `turns[0].content`.

    None if a value along the path is null.

    Raises:
        PathError: nothing is at that path.
    """
    if name in row:
        return row[name]
    column = column_of(name, row)
    if column is None:
        raise PathError(f"there is no column {name!r}")
    value, here = row[column], column
    for step in _steps(name[len(column) :]):
        if value is None:
            return None
        index = int(step) if isinstance(value, list) and isinstance(step, str) and step.isdecimal() else step
        value, here = walk(value, [index], here), f"{here}.{step}"
    return value


@functools.lru_cache(maxsize=1024)
def _steps(path: str) -> tuple[str | int, ...]:
    return tuple(parse(path.removeprefix(".")))


def _cell_or_none(row: Mapping[str, Any], name: str) -> Any:
    try:
        return cell(row, name)
    except PathError:
        return None


def to_items(ctx: Context, rows: Iterable[tuple[str, Mapping[str, Any]]], columns: Columns) -> Items:
    """Rows as prompts. Other cells are not kept in memory.

    Args:
        rows: the name of each in errors, and its cells.

    Raises:
        BadRequest: a row has no prompt.
    """
    prompts: list[Prompt] = []
    metadata: list[dict[str, Any] | None] = []
    wheres: list[str] = []
    for where, row in rows:
        if not wheres:
            columns.check_first(where, row)
        try:
            value = cell(row, columns.column)
        except PathError as error:
            reason = f"has no {columns.column!r}; it has: {listed(row)}" if "." not in columns.column else str(error)
            raise BadRequest(f"{where}: {reason}") from None
        prompt = check_prompt(ctx, value, f"{where}: {columns.column}", allow_empty=True)
        if columns.images is not None:
            prompt = _with_images(prompt, _cell_or_none(row, columns.images), f"{where}: {columns.images}")
        prompts.append(prompt)
        metadata.append(columns.metadata(row))
        wheres.append(where)
    return Items(prompts=tuple(prompts), metadata=tuple(metadata), wheres=tuple(wheres))


def _with_images(prompt: Prompt, value: Any, where: str) -> Prompt:
    """A row's text as a chat of one turn, with the row's images before it.

    Args:
        value: an image, a list of them, or None for none.

    Raises:
        BadRequest: the prompt is a chat, whose parts say where its images go; or a value is no image.
    """
    if not isinstance(prompt, str):
        raise BadRequest(f"{where}: image_column goes with texts; the chats of this column name images in their parts")
    values = [] if value is None else value if isinstance(value, list | tuple) else [value]
    parts = [{"type": "image", "image": each} for each in values if each is not None]
    text = [{"type": "text", "text": prompt}] if prompt.strip() or not parts else []
    return (Message("user", read_content([*parts, *text], where)),)


def plain(value: Any) -> Any:
    """A table's cell in JSON types: dates as ISO 8601, bytes that are not UTF-8 as base64, the rest as its text."""
    match value:
        case Spelled():
            return value.plain()
        case None | bool() | int() | float() | str():
            return value
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal():
            return Spelled(str(value)).plain()
        case Mapping():
            return {str(key): plain(each) for key, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
        case bytes():
            return _text_of(value)
        case _:
            return str(value)


def _text_of(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()
