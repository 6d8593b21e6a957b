"""The rows of a source that a task gets, in order: shuffled first, then sharded. The same for every source."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from runners.api import BadRequest, Context, MissingDependency
from runners.data.local import Table
from runners.data.prompts import Items
from runners.data.shard import Shard
from runners.data.tables import Columns, to_items

DEFAULT_SEED = 42


class Rows(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields that every source of rows has."""

    column: str | None = None
    image_column: str | None = None
    """An image of each row, or a list of them, before its prompt."""
    metadata_columns: tuple[str, ...] | dict[str, str] | None = None
    metadata_include_all: bool | None = None
    shuffle: bool | None = None
    seed: Annotated[int, Meta(ge=0)] | None = None
    buffer_size: Annotated[int, Meta(ge=1)] | None = None
    """Shuffle within a window of this many rows, as for a stream, instead of over all rows."""

    def columns(self, where: str) -> Columns:
        return Columns(
            self.column or "text",
            self.metadata_columns,
            bool(self.metadata_include_all),
            where,
            images=self.image_column,
        )


def items_of(ctx: Context, table: Table, wanted: Rows, shard: Shard | None, where: str) -> Items:
    """The task's rows of local files.

    Raises:
        BadRequest: there are none, or one is invalid; names the line.
    """
    columns = wanted.columns(where)
    if not wanted.shuffle and shard is None:
        items = to_items(ctx, table.rows(columns), columns)
        _check_some(len(items.prompts), where)
        return items
    count = table.count()
    _check_some(count, where)
    order = order_of(ctx, count, wanted, shard, where)
    if isinstance(order, range):
        mine = itertools.islice(table.rows(columns), order.start, order.stop, order.step)
        return to_items(ctx, mine, columns)
    kept = set(order)
    rows = (row for number, row in enumerate(table.rows(columns)) if number in kept)
    place = {number: at for at, number in enumerate(sorted(kept))}
    return to_items(ctx, rows, columns).at([place[number] for number in order])


def order_of(ctx: Context, count: int, wanted: Rows, shard: Shard | None, where: str) -> Sequence[int]:
    """The numbers of the task's rows, in its order.

    Args:
        count: rows of the source.

    Raises:
        MissingDependency: shuffling needs datasets.
    """
    order: Sequence[int] = range(count)
    if wanted.shuffle:
        order = _shuffled(count, DEFAULT_SEED if wanted.seed is None else wanted.seed, wanted.buffer_size)
    else:
        for name in ("seed", "buffer_size"):
            if getattr(wanted, name) is not None:
                ctx.log.warning("%s.%s: has no effect without shuffle", where, name)
    if shard is None:
        return order
    mine = shard.rows(count)
    return order[mine.start : mine.stop : mine.step]


def _shuffled(count: int, seed: int, buffer_size: int | None) -> list[int]:
    """The permutation of `datasets` for the same seed."""
    if importlib.util.find_spec("datasets") is None:
        raise MissingDependency("datasets")
    import datasets

    numbers: Any = datasets.Dataset.from_dict({"row": range(count)})
    if buffer_size is None:
        return list(numbers.shuffle(seed=seed, keep_in_memory=True)["row"])
    return [each["row"] for each in numbers.to_iterable_dataset().shuffle(seed=seed, buffer_size=buffer_size)]


def _check_some(count: int, where: str) -> None:
    if count == 0:
        raise BadRequest(f"{where}: there is not one row in it")
