"""Rewards of completions: built-in functions, a callable that the node allows, or a reward model.

A reward that cannot be loaded, or that answers with anything but one finite number a completion, is an error.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import math
import re
from collections.abc import Callable
from typing import Any, Protocol

from flowmesh.validation.names import listed
from runners.api import BadRequest, Context, MissingDependency, RunnerError
from runners.training.data import Rows
from runners.training.plan import Plan
from runners.training.reward_model import ModelReward
from runners.training.reward_text import text_of
from runners.training.settings import RewardFunction, RewardModel

LIMIT = "reward_callables"
"""The node's setting: patterns of `module:callable` that a task may name."""

DEFAULT_LENGTH = 200
ANSWER_COLUMNS = ("response", "answer", "solution")


class Reward(Protocol):
    """Scores completions. `columns` holds, for each other column of the data, one value a completion."""

    name: str
    weight: float

    def score(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]], /) -> list[float]: ...


def load(plan: Plan, ctx: Context, device: Any, rows: Rows) -> list[Reward]:
    """Load the task's rewards.

    Args:
        rows: the data, whose columns a reward may read.

    Raises:
        BadRequest: a reward cannot be loaded; says which field, and why.
    """
    rewards: list[Reward] = []
    for i, given in enumerate(plan.rewards):
        if isinstance(given, RewardModel):
            reward = ModelReward.load(given, ctx, device)
            reward.check(rows)
            rewards.append(reward)
        else:
            rewards.append(function(given, _place(plan, ctx, i), rows, ctx))
    return rewards


def check_answers(plan: Plan, ctx: Context, rows: Rows) -> None:
    """Raises BadRequest where a row has no answer for exact_match; names the row."""
    for i, given in enumerate(plan.rewards):
        if not isinstance(given, RewardModel) and given.function == "exact_match":
            _answer_column(given, _place(plan, ctx, i), rows)


def _place(plan: Plan, ctx: Context, i: int) -> str:
    return f"spec.reward[{_index(plan, i)}]" if isinstance(ctx.spec.get("reward"), list) else "spec.reward"


def decoded(columns: dict[str, list[Any]], as_json: frozenset[str]) -> dict[str, list[Any]]:
    """`columns` with the document's values; those in `as_json` are decoded from JSON."""
    return {key: [json.loads(each) for each in values] if key in as_json else values for key, values in columns.items()}


def total(
    rewards: list[Reward], prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]
) -> list[float]:
    """Weighted sum of all rewards, checked."""
    sums = [0.0] * len(completions)
    for reward in rewards:
        for i, value in enumerate(scores(reward, prompts, completions, columns)):
            sums[i] += reward.weight * value
    return sums


def scores(reward: Reward, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    """One reward's scores: a finite number for each completion.

    Raises:
        RunnerError: it says anything else.
    """
    found = reward.score(prompts, completions, columns)
    if len(found) != len(completions):
        raise RunnerError(f"reward {reward.name}: {len(found)} rewards for {len(completions)} completions")
    for value, completion in zip(found, completions, strict=True):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise RunnerError(f"reward {reward.name}: {value!r} for {completion!r:.80}; a finite number is needed")
    return [float(value) for value in found]


class FunctionReward:
    """A reward that is computed from the texts."""

    def __init__(self, name: str, weight: float, rate: Callable[[Any, str, dict[str, Any]], float]) -> None:
        self.name = name
        self.weight = weight
        self._rate = rate

    def score(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        rows = [{key: values[i] for key, values in columns.items()} for i in range(len(completions))]
        return [self._rate(*each) for each in zip(prompts, completions, rows, strict=True)]


class CallableReward:
    """A user's function: `(prompts, completions, **columns) -> [float]`."""

    def __init__(self, name: str, weight: float, call: Callable[..., Any]) -> None:
        self.name = name
        self.weight = weight
        self._call = call

    def score(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        try:
            found = self._call(prompts=prompts, completions=completions, **columns)
        except (MemoryError, RunnerError):
            raise
        except Exception as error:
            raise RunnerError(f"reward {self.name} raised {type(error).__name__}: {error}") from error
        if hasattr(found, "tolist"):
            found = found.tolist()
        if not isinstance(found, list | tuple):
            raise RunnerError(f"reward {self.name}: a list of numbers is needed, it returned {type(found).__name__}")
        return list(found)


def function(given: RewardFunction, where: str, rows: Rows, ctx: Context) -> Reward:
    """The function that `given` names; `where` is its dotted place in the task."""
    _refuse_strangers(given, where)
    match given.function:
        case "length":
            target = given.target or DEFAULT_LENGTH
            return FunctionReward("length", given.weight, lambda _p, text, _c: min(len(text) / target, 1.0))
        case "regex":
            if given.pattern is None:
                raise BadRequest(f"{where}.pattern: missing; function regex needs it")
            try:
                pattern = re.compile(given.pattern)
            except re.error as error:
                raise BadRequest(f"{where}.pattern: not a regular expression: {error}") from None
            return FunctionReward("regex", given.weight, lambda _p, text, _c: float(bool(pattern.search(text))))
        case "exact_match":
            column = _answer_column(given, where, rows)
            return FunctionReward(
                "exact_match", given.weight, lambda _p, text, row: float(text.strip() in spellings(row[column], rows))
            )
        case "json_valid":
            return FunctionReward("json_valid", given.weight, lambda _p, text, _c: float(_is_json(text)))
        case name if ":" in name:
            return CallableReward(name, given.weight, _import(name, where, ctx))
        case name:
            known = "length, regex, exact_match, json_valid, module:callable"
            raise BadRequest(f"{where}.function: {name!r} is none; known: {known}")


_TAKES = {"pattern": "regex", "target": "length", "column": "exact_match"}


def _refuse_strangers(given: RewardFunction, where: str) -> None:
    for field, user in _TAKES.items():
        if getattr(given, field) is not None and given.function != user:
            raise BadRequest(f"{where}.{field}: only function {user} reads it; this one is {given.function}")


def _answer_column(given: RewardFunction, where: str, rows: Rows) -> str:
    columns = [name for name in rows.dataset.column_names if name != "prompt"]
    wanted = [given.column] if given.column else [name for name in ANSWER_COLUMNS if name in columns]
    if not wanted or wanted[0] not in columns:
        there = listed(columns)
        hint = "name the column that holds the answer (or set spec.data's response_field)"
        raise BadRequest(f"{where}.column: {given.column or 'missing'}; {hint}; there are: {there}")
    column = str(wanted[0])
    for i, answer in enumerate(decoded({column: rows.dataset[column][:]}, rows.as_json)[column]):
        if answer is None or (isinstance(answer, str) and not answer.strip()):
            raise BadRequest(f"{rows.where(i)}: column {column!r}: no answer to compare with; fill it or drop the row")
    return column


def spellings(value: Any, rows: Rows) -> tuple[str, ...]:
    """An answer as the document writes it: 4 is not 4.0, and true is not True.

    A dataset's column of floats does not show whether the document wrote 4 or 4.0: both count.
    """
    if isinstance(value, str):
        return (value.strip(),)
    written = json.dumps(value, ensure_ascii=False)
    if rows.is_arrow and isinstance(value, float) and value.is_integer():
        return written, str(int(value))
    return (written,)


def _is_json(text: str) -> bool:
    """As RFC 8259 has it: NaN and Infinity are not."""

    def refuse(name: str) -> float:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _import(name: str, where: str, ctx: Context) -> Callable[..., Any]:
    allowed = ctx.job.limits.get(LIMIT) or []
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed):
        raise BadRequest(
            f"{where}.function: this node does not allow {name!r}; its setting [runners] {LIMIT} lists what it does"
        )
    module, _, attribute = name.partition(":")
    try:
        call = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise MissingDependency(str(error.name), f"{where}.function: {name!r}") from error
    except (ImportError, AttributeError) as error:
        raise BadRequest(f"{where}.function: cannot import {name!r}: {error}") from error
    if not callable(call):
        raise BadRequest(f"{where}.function: {name!r} is a {type(call).__name__} and cannot be called")
    found: Callable[..., Any] = call
    return found


def _index(plan: Plan, position: int) -> int:
    return position - sum(isinstance(given, RewardModel) for given in plan.rewards[:position])


_TRL_EXTRAS = frozenset(
    {
        "completion_ids",
        "prompt_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
        "completions",
        "prompts",
        "environments",
    }
)


def for_trl(reward: Reward, as_json: frozenset[str]) -> Callable[..., list[float]]:
    """`reward` in the shape of TRL's reward functions: completions are texts, or chats of one answer.

    Args:
        as_json: columns whose values are JSON text.
    """

    def call(prompts: list[Any], completions: list[Any], **more: Any) -> list[float]:
        columns = {key: value for key, value in more.items() if key not in _TRL_EXTRAS and isinstance(value, list)}
        texts = [text_of(completion) for completion in completions]
        return scores(reward, prompts, texts, decoded(columns, as_json))

    call.__name__ = re.sub(r"\W", "_", reward.name)
    return call
