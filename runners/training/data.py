"""Loads a task's rows from any source as a `datasets.Dataset` with the trainer's columns.

`shapes` checks and converts each row.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from runners.api import BadRequest, Context, RunnerError
from runners.data.local import Table
from runners.data.readers import Row
from runners.data.tables import column_of
from runners.training.inputs import JsonlFile
from runners.training.local_rows import LocalRows, beyond, chosen_rows
from runners.training.plan import Plan
from runners.training.shapes import EXTRAS, REFUSED, missing, shape
from runners.training.sources import Column

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 4096
"""Rows held as Python objects at a time. The rest is Arrow."""
BATCHES_IN_MEMORY = 64
"""Batches held in memory. The rest is mapped from files of this attempt."""
ARROW_INT_BITS = 63
CHATS = ("messages", "prompt", "chosen", "rejected", "completion")
FILL: dict[str, Any] = {"chat_template_kwargs": {}}
"""Values other than None for a column that a row lacks and others have."""
EMPTY = "spec.data: there is not one row to train on"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a task before tokenization."""

    dataset: Dataset
    where: Callable[[int], str]
    """Maps a row's index to its place in the source, for errors."""
    as_json: frozenset[str] = frozenset()
    """Columns for rewards that are stored as JSON text, because Arrow would change their types."""
    is_arrow: bool = False
    """Whether the values come from another library's tables, where a column of integers may have become floats."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of rows dropped so far, by reason."""
    truncated: int = 0
    """Rows whose prompt was cut."""

    def selected(self, chosen: list[int]) -> Rows:
        """Only these rows, by their indices; each keeps its place in the source."""
        return replace(self, dataset=self.dataset.select(chosen), where=lambda i: self.where(chosen[i]))


def load(plan: Plan, ctx: Context, jsonl: JsonlFile | None) -> Rows:
    """The training rows of the task: checked, in the trainer's columns, cut to `max_samples`, then sharded.

    Args:
        jsonl: the local copy of the task's JSONL file, where it has one.

    Raises:
        BadRequest: naming the place of the first bad row, the missing column and those there are.
    """
    opened = open_dataset(plan, ctx) if plan.source == "dataset" else None
    if opened is None or isinstance(opened, Table):
        rows = _from_rows(plan, ctx, LocalRows(plan, jsonl, opened, ctx.reach))
    else:
        rows = _dataset(plan, ctx, opened)
    if len(rows.dataset) == 0:
        raise BadRequest(EMPTY)
    return rows


def _from_rows(plan: Plan, ctx: Context, rows: LocalRows) -> Rows:
    """Rows in the task itself, or in local files."""
    if not plan.kind.rewarded:
        _log_unread(ctx, next(iter(rows), ("", {}))[1], rows.columns)
    chosen, dropped = rows.chosen()

    def mine() -> Iterable[Row]:
        return rows if chosen is None else itertools.islice(rows, chosen.start, chosen.stop, chosen.step)

    def shaped() -> Iterator[dict[str, Any]]:
        return (shape(row, rows.columns, where, plan) for where, row in mine())

    dataset, as_json = _arrow(plan, ctx, shaped)
    return Rows(
        dataset=dataset,
        where=lambda i: next(itertools.islice(mine(), i, None))[0],
        as_json=as_json,
        is_arrow=rows.is_arrow,
        dropped=dropped,
    )


def _log_unread(ctx: Context, there: Any, columns: list[Column]) -> None:
    """Log columns that no trainer reads: ids, sources, scores."""
    read = {*(column.name for column in columns), "messages", *EXTRAS, *REFUSED}
    if isinstance(there, list | dict) and (unread := [str(name) for name in there if name not in read]):
        ctx.log.info("columns not read: %s", ", ".join(unread))


def _arrow(plan: Plan, ctx: Context, shaped: Callable[[], Iterator[dict[str, Any]]]) -> tuple[Dataset, frozenset[str]]:
    """The rows as a dataset, and its columns of JSON text. Reads the rows twice, first for their types."""
    import pyarrow as pa  # type: ignore[import-not-found,unused-ignore]
    from datasets import Dataset, Features, concatenate_datasets

    kinds: dict[str, set[type]] = {}
    for row in shaped():
        for key, value in row.items():
            kinds.setdefault(key, set()).add(_kind(value))
    if not kinds:
        raise BadRequest(EMPTY)
    _refuse_mixed(kinds)
    as_json = frozenset(key for key, types in kinds.items() if plan.kind.rewarded and _loses_types(key, types))
    features = Features({key: _feature(key, types, as_json=key in as_json) for key, types in kinds.items()})

    def cell(row: dict[str, Any], key: str) -> Any:
        return json.dumps(row.get(key)) if key in as_json else row.get(key, FILL.get(key))

    rows = shaped()
    tables: list[Dataset] = []
    try:
        while part := list(itertools.islice(rows, BATCH)):
            cells = [{key: cell(row, key) for key in kinds} for row in part]
            tables.append(_on_disk(Dataset.from_list(cells, features=features), ctx, len(tables)))
        return concatenate_datasets(tables), as_json
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise BadRequest(f"spec.data: a column mixes types ({type(error).__name__}); give each one type") from None


def _on_disk(dataset: Dataset, ctx: Context, number: int) -> Dataset:
    """A batch of rows, mapped from a file of this attempt where there are many before it."""
    import pyarrow as pa  # type: ignore[import-not-found,unused-ignore]
    from datasets import Dataset

    if number < BATCHES_IN_MEMORY:
        return dataset
    path, table = str(ctx.tmp_dir / f"rows-{os.getpid()}-{number}.arrow"), dataset.data.table
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    mapped: Dataset = Dataset.from_file(path)
    return mapped


def _kind(value: Any) -> type:
    if isinstance(value, float):
        return float  # also where it still has its spelling
    return object if isinstance(value, int) and value.bit_length() > ARROW_INT_BITS else type(value)


def _loses_types(name: str, types: set[type]) -> bool:
    """Whether Arrow would change values of these types: 4 becomes 4.0 in a column with 2.5."""
    return name != "prompt" and (len(types - {type(None)}) > 1 or not types <= {str, int, float, bool, type(None)})


def _feature(name: str, types: set[type], *, as_json: bool) -> Any:
    from datasets import Json, List, Value

    if as_json:
        return Value("string")
    if list in types and name in CHATS:
        return List(Json())
    if dict in types:
        return Json()
    return Value(next((kind for of, kind in _KINDS.items() if of in types), "string"))


_KINDS: dict[type, str] = {str: "string", bool: "bool", int: "int64", float: "float64"}


def _refuse_mixed(kinds: dict[str, set[type]]) -> None:
    for name, types in kinds.items():
        if name in CHATS and {str, list} <= types:
            raise BadRequest(f"spec.data: {name!r} is a text in some rows and a chat in others; give one shape")


def _dataset(plan: Plan, ctx: Context, dataset: Dataset) -> Rows:
    """Rows of a dataset that `datasets` reads: of the hub, or of a `save_to_disk` folder."""
    columns = plan.data.columns(jsonl=False)
    there = list(dataset.column_names)
    if columns[0].role == "text" and columns[0].name == "text" and "text" not in there and "messages" in there:
        columns = [Column("messages", "messages", columns[0].setting)]
    roots = {column.name: column_of(column.name, there) for column in columns}
    if plan.kind.head == "causal" and roots[columns[0].name] is None and _are_texts(dataset, columns[1:]):
        raise BadRequest(f"spec.data.dataset_name {plan.data.dataset_name!r}: {missing(columns[0], there)}")
    columns = [column for column in columns if column.required or roots[column.name]]
    for column in columns:
        if roots[column.name] is None:
            raise BadRequest(f"spec.data.dataset_name {plan.data.dataset_name!r}: {missing(column, there)}")
    names = [name for name in there if name in roots.values()]
    rest = [name for name in there if name not in names]
    if not plan.kind.rewarded:
        rest = [name for name in rest if name in (*EXTRAS, *REFUSED)]
        _log_unread(ctx, there, columns)
    name = plan.data.dataset_name
    count = len(dataset)
    chosen = chosen_rows(plan, count)
    dataset = dataset.select(chosen)
    if count == 0:
        raise BadRequest(EMPTY)

    def rows(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        keys = [*names, *rest]
        shaped = [
            shape(dict(zip(keys, values, strict=True)), columns, f"{name} row {chosen[i]}", plan)
            for i, values in zip(indices, zip(*(batch[key] for key in keys), strict=True), strict=True)
        ]
        return {key: [row.get(key, FILL.get(key)) for row in shaped] for key in features}

    features = _mapped_features(plan, dataset, columns, rest, f"{name} row {chosen[0]}") if len(dataset) else {}
    return Rows(
        dataset=mapped(dataset, rows, ctx, name="rows", features=features, batched=True, remove_columns=there)
        if len(dataset)
        else dataset,
        where=lambda i: f"{name} row {chosen[i]}",
        is_arrow=True,
        dropped=beyond(plan, count),
    )


def _are_texts(dataset: Dataset, columns: list[Column]) -> bool:
    return all(getattr(dataset.features.get(column.name), "dtype", "string") == "string" for column in columns)


def _mapped_features(plan: Plan, dataset: Dataset, columns: list[Column], rest: list[str], where: str) -> Any:
    """Types of the columns after `shape`. Messages may differ in keys; columns for rewards keep their types."""
    from datasets import Features, Json, Value

    first = shape(dataset[0], columns, where, plan)
    found = {key: _feature(key, {type(value)}, as_json=False) for key, value in first.items()}
    if plan.kind.rewarded:
        return Features(found | {name: dataset.features[name] for name in rest})
    extra = {"tools": Value("string"), "chat_template_kwargs": Json(), "weight": Value("int64")}
    extra |= {"margin": Value("float64")} if plan.kind.task_type == "reward" else {}
    return Features(found | {name: kind for name, kind in extra.items() if name in rest})


def mapped(dataset: Dataset, function: Callable[..., Any], ctx: Context, *, name: str, **options: Any) -> Dataset:
    """`dataset.map` with row indices, in memory for a small dataset, else in this attempt's folder.

    `datasets` cannot tell our closures apart, and caches what the trainer derives from these rows under their
    fingerprint, beside them. In this attempt's folder no other task can find it.
    """
    in_memory = dataset.data.nbytes < 2**28
    if options.get("batched"):
        options["batch_size"] = BATCH
    found: Dataset = dataset.map(
        function,
        with_indices=True,
        load_from_cache_file=False,
        new_fingerprint=f"{dataset._fingerprint}-{name}",
        keep_in_memory=in_memory,
        cache_file_name=None if in_memory else str(ctx.tmp_dir / f"{name}-{os.getpid()}.arrow"),
        **options,
    )
    return found


def open_dataset(plan: Plan, ctx: Context) -> Any:
    """Open a hub dataset, a local folder or a local file.

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
    except RunnerError as error:  # the shared loader names the fields of inference tasks
        text = str(error).replace("spec.data.url", "spec.data.dataset_name")
        raise type(error)(text.replace("spec.data.name:", "spec.data.config_name:")) from error
