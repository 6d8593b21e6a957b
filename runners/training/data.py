"""Rows to train on, from wherever the task has them, as a `datasets.Dataset` with the columns the trainer knows.

What is wrong with a row is told with its place: the file and line, the item's number, or the dataset's row.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from runners.api import BadRequest, Context, RunnerError
from runners.data.local import Table
from runners.data.paths import PathError
from runners.data.prompts import check_text
from runners.data.readers import File, Row, read
from runners.data.tables import cell, column_of
from runners.training.inputs import JsonlFile
from runners.training.plan import Plan
from runners.training.sources import Column, TextData

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 4096
"""Rows that are Python objects at a time; the rest is Arrow."""
BATCHES_IN_MEMORY = 64
"""The rows behind them wait in files of this attempt."""
CHAT = ("role", "content")
LABELS = {"true": True, "false": False, "1": True, "0": False}
"""As text files spell them."""


def load(plan: Plan, ctx: Context, jsonl: JsonlFile | None) -> Dataset:
    """The training rows of the task: checked, in the trainer's columns, cut to `max_samples`, then sharded.

    Args:
        jsonl: the local copy of the task's JSONL file, where it has one.

    Raises:
        BadRequest: naming the place of the first bad row, the missing column and those there are.
    """
    opened = open_dataset(plan, ctx) if plan.source == "dataset" else None
    if opened is None or isinstance(opened, Table):
        dataset = _from_rows(plan, ctx, LocalRows(plan, jsonl, opened))
    else:
        dataset = _dataset(plan, ctx, opened)
    if len(dataset) == 0:
        raise BadRequest("spec.data: there is not one row to train on")
    return dataset


def _chosen(plan: Plan, count: int) -> range:
    """The rows, of `count`, that are this task's."""
    if plan.data.max_samples is not None:
        count = min(plan.data.max_samples, count)
    return range(count) if plan.shard is None else plan.shard.rows(count)


class LocalRows:
    """Rows that are in the task itself or in files of this node. May be iterated more than once."""

    def __init__(self, plan: Plan, jsonl: JsonlFile | None, table: Table | None) -> None:
        self._plan = plan
        self._jsonl = jsonl
        self._table = table
        self.columns = plan.data.columns(jsonl=jsonl is not None)

    def __iter__(self) -> Iterator[Row]:
        if self._table is not None:
            return self._table.rows()
        return inline_rows(self._plan) if self._jsonl is None else jsonl_rows(self._jsonl)

    def chosen(self) -> Iterable[Row]:
        """This task's part of them."""
        rows = itertools.islice(self, self._plan.data.max_samples)
        if self._plan.shard is None:
            return rows
        mine = self._plan.shard.rows(sum(1 for _ in rows))
        return itertools.islice(self, mine.start, mine.stop, mine.step)


def _from_rows(plan: Plan, ctx: Context, rows: LocalRows) -> Dataset:
    import pyarrow as pa  # type: ignore[import-not-found,unused-ignore]
    from datasets import Dataset

    shaped = (shape(row, rows.columns, where, plan) for where, row in rows.chosen())
    tables: list[Any] = []
    try:
        while part := list(itertools.islice(shaped, BATCH)):
            tables.append(_on_disk(pa.Table.from_pylist(_same_keys(part)), ctx, len(tables)))
        if not tables:
            raise BadRequest("spec.data: there is not one row to train on")
        return Dataset(pa.concat_tables(tables, promote_options="permissive"))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise BadRequest(f"spec.data: a column mixes types: {error}") from None
    except OverflowError:
        raise BadRequest("spec.data: an integer has more than 64 bits; write it as a string") from None


def _on_disk(table: Any, ctx: Context, number: int) -> Any:
    """`table` mapped from a file of this attempt, where the rows may be many."""
    import pyarrow as pa  # type: ignore[import-not-found,unused-ignore]

    if number < BATCHES_IN_MEMORY:
        return table
    path = str(ctx.tmp_dir / f"rows-{os.getpid()}-{number}.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return pa.ipc.open_stream(pa.memory_map(path)).read_all()


def _same_keys(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = {key: None for row in rows for key in row}
    return [{key: row.get(key) for key in keys} for row in rows]


def inline_rows(plan: Plan) -> Iterator[Row]:
    """The rows that stand in the task itself, each with its dotted place."""
    assert plan.data.inline is not None
    name, rows = plan.data.inline
    for i, row in enumerate(rows):
        where = f"spec.data.{name}[{i}]"
        check_text(row, where)
        yield where, row


def jsonl_rows(file: JsonlFile) -> Iterator[Row]:
    """The objects of a JSONL file, each with file and line; empty lines are skipped."""
    return read(File(path=file.path, format="jsonl", where=file.name))


def shape(row: Mapping[str, Any], columns: list[Column], where: str, plan: Plan) -> dict[str, Any]:
    """`row` in the trainer's columns.

    Raises:
        BadRequest: a column is missing or holds what cannot be trained on.
    """
    if not isinstance(row, dict):
        raise BadRequest(f"{where}: a mapping with {', '.join(c.name for c in columns)} is needed, found {row!r:.80}")
    if columns[0].role == "text" and _is_chat_instead(row, columns[0], plan):
        columns = [Column("messages", "messages", columns[0].setting)]
    found: dict[str, Any] = {}
    for column in columns:
        try:
            value = cell(row, column.name)
        except PathError:
            if column.required:
                raise BadRequest(f"{where}: {missing(column, list(row))}") from None
            continue
        found[column.role] = checked(value, column, where)
    if plan.kind.rewarded:  # rewards may look at any other column
        taken = {column.name for column in columns}
        found |= {key: value for key, value in row.items() if key not in found and key not in taken}
    return _joined(found, plan)


def _is_chat_instead(row: dict[str, Any], text: Column, plan: Plan) -> bool:
    """A row of {messages} where the task names no column: chat."""
    return text.name == "text" and "text" not in row and "messages" in row and isinstance(plan.data, TextData)


def _joined(found: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """A prompt and a response of sft's are one text; a column of chats is called messages."""
    if not isinstance(plan.data, TextData):
        return found
    if "prompt" in found:
        separator = plan.data.separator_of(jsonl=plan.source == "jsonl")
        return {"text": f"{found['prompt']}{separator}{found['response']}"}
    if isinstance(found.get("text"), list):
        return {"messages": found["text"]}
    return found


def missing(column: Column, there: list[str]) -> str:
    return f"no column {column.name!r} ({column.setting}); there are: {', '.join(map(repr, there)) or 'none'}"


def checked(value: Any, column: Column, where: str) -> Any:
    """`value` where it suits its column."""
    place = f"{where}: column {column.name!r}"
    if column.role == "label":
        known = LABELS.get(value.lower()) if isinstance(value, str) else bool(value) if value in (0, 1) else None
        if known is not None:
            return known
        raise BadRequest(f"{place}: true or false is needed, found {value!r:.80}")
    if isinstance(value, list) and column.role != "response" and value:
        for i, message in enumerate(value):
            if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in CHAT):
                raise BadRequest(f"{place}: message {i} must be {{role, content}} with texts, found {message!r:.80}")
        return [{key: message[key] for key in CHAT} for message in value]
    if not isinstance(value, str):
        raise BadRequest(f"{place}: a text or a list of chat messages is needed, found {value!r:.80}")
    if column.role == "messages":
        raise BadRequest(f"{place}: a list of chat messages is needed, found a text")
    if column.role == "prompt" and not value:
        raise BadRequest(f"{place}: the prompt is empty")
    return value


def _dataset(plan: Plan, ctx: Context, dataset: Dataset) -> Dataset:
    """The rows of a dataset that the library reads: the hub's, or what `save_to_disk` wrote."""
    columns = plan.data.columns(jsonl=False)
    there = list(dataset.column_names)
    if columns[0].role == "text" and columns[0].name == "text" and "text" not in there and "messages" in there:
        columns = [Column("messages", "messages", columns[0].setting)]
    roots = {column.name: column_of(column.name, there) for column in columns}
    columns = [column for column in columns if column.required or roots[column.name]]
    for column in columns:
        if roots[column.name] is None:
            raise BadRequest(f"spec.data.dataset_name {plan.data.dataset_name!r}: {missing(column, there)}")
    names = [name for name in there if name in roots.values()]
    rest = [name for name in there if name not in names] if plan.kind.rewarded else []
    name = plan.data.dataset_name

    def rows(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        keys = [*names, *rest]
        shaped = [
            shape(dict(zip(keys, values, strict=True)), columns, f"{name} row {chosen[i]}", plan)
            for i, values in zip(indices, zip(*(batch[key] for key in keys), strict=True), strict=True)
        ]
        return {key: [row[key] for row in shaped] for key in shaped[0]}

    chosen = _chosen(plan, len(dataset))
    dataset = dataset.select(chosen)
    if len(dataset) == 0:
        return dataset
    in_memory = dataset.dataset_size is not None and dataset.dataset_size < 2**28
    mapped: Dataset = dataset.map(
        rows,
        batched=True,
        batch_size=BATCH,
        with_indices=True,
        remove_columns=there,
        load_from_cache_file=False,
        # `datasets` cannot tell our closures apart. What the trainer makes of these rows it keeps under a name made of
        # this one, beside them: in this attempt's own folder no other task finds it.
        new_fingerprint=f"{dataset._fingerprint}-flowmesh",
        keep_in_memory=in_memory,
        cache_file_name=None if in_memory else str(ctx.tmp_dir / f"rows-{os.getpid()}.arrow"),
    )
    return mapped


def open_dataset(plan: Plan, ctx: Context) -> Any:
    """A dataset of the hub's, a local folder or a local file.

    Raises:
        BadRequest: there is none, or it cannot be read; says why.
        RunnerError: the hub cannot be reached.
    """
    from runners.data import hub

    data = plan.data
    source = hub.HubData(
        type="dataset",
        url=str(data.dataset_name),
        name=data.config_name,
        split=data.split,
        revision=data.revision,
    )
    try:
        return hub.open_dataset(ctx, source, "spec.data", called=str(data.dataset_name))
    except RunnerError as error:  # the shared loader calls the fields as the inference tasks do
        text = str(error).replace("spec.data.url", "spec.data.dataset_name")
        raise type(error)(text.replace("spec.data.name:", "spec.data.config_name:")) from error
