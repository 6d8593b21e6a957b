"""Rows of a table as prompts with metadata; what all file formats and `datasets` have in common."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runners.api import BadRequest, Context
from runners.data.prompts import Items, check_prompt

_SHOWN = 30


class Columns:
    """Which column holds the prompt, and which ones go into its metadata."""

    def __init__(
        self, column: str, metadata: Sequence[str] | Mapping[str, str] | None, include_all: bool, where: str
    ) -> None:
        self.column = column
        self.include_all = include_all
        self.renamed = dict(metadata) if isinstance(metadata, Mapping) else {name: name for name in metadata or ()}
        self._where = where

    def check(self, there: Iterable[str]) -> None:
        """Raises BadRequest, listing the columns `there` are, where one that the task names is missing."""
        names = list(there)
        listed = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        if self.column not in names:
            raise BadRequest(f"{self._where}.column: no column {self.column!r}; there are: {listed}")
        for name in self.renamed:
            if name not in names:
                raise BadRequest(f"{self._where}.metadata_columns: no column {name!r}; there are: {listed}")

    def wanted(self, there: Iterable[str]) -> list[str]:
        """The columns that have to be read, of those `there` are."""
        return [name for name in there if self.include_all or name == self.column or name in self.renamed]

    def metadata(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """A row's metadata in JSON types; None where the task wants none."""
        if not self.renamed and not self.include_all:
            return None
        names = [name for name in row if name != self.column] if self.include_all else list(self.renamed)
        names += [name for name in self.renamed if name not in names]
        return {self.renamed.get(name, name): plain(row.get(name)) for name in names}


def to_items(ctx: Context, rows: Iterable[tuple[str, Mapping[str, Any]]], columns: Columns) -> Items:
    """Rows as prompts. Of each, no more is kept than goes into them.

    Args:
        rows: what each is called in an error, and its cells.

    Raises:
        BadRequest: a row has no prompt.
    """
    prompts, metadata, wheres = [], [], []
    for where, row in rows:
        if columns.column not in row:
            raise BadRequest(f"{where}: has no {columns.column!r}; it has: {', '.join(map(str, row)) or 'nothing'}")
        prompts.append(check_prompt(ctx, row[columns.column], f"{where}: {columns.column}", allow_empty=True))
        metadata.append(columns.metadata(row))
        wheres.append(where)
    return Items(prompts=tuple(prompts), metadata=tuple(metadata), wheres=tuple(wheres))


def plain(value: Any) -> Any:
    """A table's cell in JSON types: dates as ISO 8601, what has no such type as text."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal():
            return float(value)
        case Mapping():
            return {str(key): plain(each) for key, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
        case bytes():
            return value.decode(errors="replace")
        case _:
            return str(value)
