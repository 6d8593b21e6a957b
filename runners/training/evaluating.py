"""Loads the rows to evaluate on: their own section, a share of the training rows, or another split."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec

from runners.api import BadRequest, Context, RunnerError
from runners.training import data
from runners.training.data import Rows
from runners.training.inputs import Inputs
from runners.training.plan import Plan

COMPARED = 50_000
"""Rows that are compared to find those that are both trained and evaluated on."""


def load(plan: Plan, ctx: Context, fetched: Inputs) -> dict[str, Rows]:
    """The rows of a task by TRL's names: `train`, and `eval` where the task asks for evaluation.

    Raises:
        BadRequest: as `data.load`, with the fields named as in `spec.data.eval`.
    """
    rows = data.load(plan, ctx, fetched.jsonl)
    split = plan.data.eval_split
    if plan.eval_data is not None:
        with named("spec.data.eval"):
            found = data.load(of_eval(plan), ctx, fetched.eval_jsonl)
    elif isinstance(split, str):
        with named("spec.data.eval_split"):
            other = msgspec.structs.replace(plan.data, split=split, eval_split=None)
            found = data.load(dataclasses.replace(plan, data=other, shard=None), ctx, None)
    elif split is not None:
        return _parted(rows, split, plan.training.seed)
    else:
        return {"train": rows}
    _warn_shared(ctx, rows, found)
    return _alike({"train": rows, "eval": found})


def of_eval(plan: Plan) -> Plan:
    """The plan with the evaluation rows as its data, without a shard."""
    assert plan.eval_data is not None
    assert plan.eval_source is not None
    return dataclasses.replace(plan, data=plan.eval_data, source=plan.eval_source, shard=None)


def _warn_shared(ctx: Context, rows: Rows, held: Rows) -> None:
    """Warn where rows to evaluate on are among the training rows, of which the first `COMPARED` are looked at."""
    wanted = {_text_of(row) for row in itertools.islice(held.dataset, COMPARED)}
    trained = wanted.intersection(_text_of(row) for row in itertools.islice(rows.dataset, COMPARED))
    if trained:
        ctx.log.warning(
            "%d of %d different rows to evaluate on are trained on as well: eval_loss does not show how the model does "
            "on other rows; see spec.data.eval and eval_split", len(trained), len(wanted),
        )  # fmt: skip


def _text_of(row: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in row.items() if value is not None}, sort_keys=True, default=str)


def _alike(rows: dict[str, Rows]) -> dict[str, Rows]:
    """Store the same columns as JSON text in both: a reward cannot tell which rows it scores."""
    as_json = frozenset[str]().union(*(each.as_json for each in rows.values()))
    found = {}
    for name, each in rows.items():
        dataset = each.dataset
        for column in (as_json - each.as_json) & {*dataset.column_names}:
            texts = [json.dumps(value) for value in dataset[column]]
            dataset = dataset.remove_columns(column).add_column(column, texts)
        found[name] = dataclasses.replace(each, dataset=dataset, as_json=as_json)
    return found


def _parted(rows: Rows, share: float, seed: int) -> dict[str, Rows]:
    """Split the rows by the task's seed, so that all ranks and a resumed run split alike."""
    count = len(rows.dataset)
    held = round(share * count)
    if not 0 < held < count:
        raise BadRequest(f"spec.data.eval_split: {share} of {count} rows leaves nothing to evaluate on, or to train on")
    order = list(range(count))
    random.Random(f"{seed}-eval").shuffle(order)
    parts = {"train": sorted(order[held:]), "eval": sorted(order[:held])}
    return {name: rows.selected(chosen) for name, chosen in parts.items()}


@contextlib.contextmanager
def named(section: str) -> Iterator[None]:
    """Rename `spec.data` to `section` in errors."""
    try:
        yield
    except RunnerError as error:
        raise type(error)(str(error).replace("spec.data", section)) from error
