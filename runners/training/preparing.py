"""Tokenizes rows as TRL does, and counts each dropped row by its reason.

TRL drops rows silently, and trains on nothing if none is left. Here that is an error.
"""

from __future__ import annotations

from typing import Any

import trl

from runners.api import BadRequest, Context
from runners.training import templates
from runners.training.bounds import Bounds
from runners.training.data import Rows, mapped
from runners.training.plan import Plan
from runners.training.reward_text import answer_ids
from runners.training.sft_rows import MASKED, SftRows

TOO_LONG = "longer than spec.training.max_seq_length"
PROMPT_TOO_LONG = "the prompt alone fills spec.training.max_seq_length"
MASKED_AWAY = "nothing to learn from within spec.training.max_seq_length"
NO_TOKENS = "empty"
NO_ANSWER = "an empty answer"
SAME = "chosen and rejected are the same"
SAME_CUT = "chosen and rejected are the same within spec.training.max_seq_length"
NO_WEIGHT = "weight 0"


class Prepared:
    """Prepares a task's rows and counts them while the trainer is built."""

    def __init__(self, plan: Plan, ctx: Context, rows: dict[str, Rows], bounds: Bounds) -> None:
        """
        Args:
            rows: by TRL's name of them: `train`, and `eval` where there are any.
            bounds: of the model.
        """
        self._plan, self._ctx, self._rows, self._bounds = plan, ctx, rows, bounds
        self.dropped = {name: dict(each.dropped) for name, each in rows.items()}
        self.size = {name: len(each.dataset) for name, each in rows.items()}
        self.truncated = dict.fromkeys(rows, 0)

    def trainer(self) -> type:
        """TRL's trainer class, whose rows this object prepares."""
        base = getattr(trl, self._plan.kind.trainer)
        prepared = self

        class Trainer(base):  # type: ignore[misc, valid-type]
            def _prepare_dataset(self, dataset: Any, tokenizer: Any, args: Any, *rest: Any) -> Any:
                name = rest[-1]
                packs = isinstance(rest[0], bool) and rest[0]
                ready = prepared.prepare(name, dataset, tokenizer, args, packs=packs)
                found = super()._prepare_dataset(ready, tokenizer, args, *rest)
                return prepared.counted(name, found, args, dropped=0 if packs else len(ready) - len(found))

        Trainer.__name__ = Trainer.__qualname__ = base.__name__
        return Trainer

    def prepare(self, name: str, dataset: Any, tokenizer: Any, args: Any, *, packs: bool) -> Any:
        """The steps of preparation that are not left to TRL."""
        if self._plan.kind.trainer == "SFTTrainer":
            return self._sft(name, dataset, SftRows(tokenizer, args), args, packs=packs)
        dataset = self._answered(name, dataset)
        rows = self._rows[name]
        if self._plan.kind.trainer == "RewardTrainer":
            return self._reward(name, dataset, tokenizer, args.max_length)
        return _as_written(rows, dataset, tokenizer, self._ctx)

    def counted(self, name: str, found: Any, args: Any, *, dropped: int) -> Any:
        """The rows that TRL kept, without those that nothing can be learned from; all others are counted.

        Args:
            dropped: number of rows that TRL dropped.

        Raises:
            BadRequest: no row is left, or one exceeds the model's limits.
        """
        self._drop(name, PROMPT_TOO_LONG, dropped)
        if "prompt_ids" in found.column_names:
            self._check_written(name, found, args.max_length)
            found = self._differing(name, found, args)
        self.report(name)
        return found

    def report(self, name: str) -> None:
        """Log dropped and truncated rows.

        Raises:
            BadRequest: no row is left.
        """
        text = ", ".join(f"{count} ({reason})" for reason, count in self.dropped[name].items())
        if self.size[name] == 0:
            field = "spec.data" if name == "train" else "spec.data.eval"
            remedy = f"; it is {self._plan.training.max_seq_length}: raise it" if "max_seq_length" in text else ""
            raise BadRequest(f"{field}: no row is left of {len(self._rows[name].dataset)}; dropped: {text}{remedy}")
        if text:
            self._ctx.log.warning("rows dropped dataset=%s dropped=%s left=%d", name, text, self.size[name])
        if self.truncated[name]:
            self._ctx.log.warning(
                "rows truncated to spec.training.max_seq_length dataset=%s truncated=%d of=%d",
                name,
                self.truncated[name],
                self.size[name],
            )

    def _check_written(self, name: str, dataset: Any, max_length: int | None) -> None:
        """Check rows of dpo and kto after TRL has tokenized them, and count those that its collator will cut."""
        sides = [each for each in ("chosen_ids", "rejected_ids", "completion_ids") if each in dataset.column_names]
        same = len(dataset) == len(self._rows[name].dataset)
        cut = 0
        for i, row in enumerate(dataset.select_columns(["prompt_ids", *sides])):
            whole = [[*row["prompt_ids"], *row[side]] for side in sides]
            cut += max_length is not None and max(map(len, whole)) > max_length
            for ids in whole:
                self._bounds.check(
                    ids[:max_length],
                    lambda i=i: self._rows[name].where(i) if same else "spec.data: a row",  # type: ignore[misc]
                )
        self.truncated[name] = cut

    def _answered(self, name: str, dataset: Any) -> Any:
        """The rows without those that have an empty answer, such as an empty cell of a table."""
        sides = [side for side in ("chosen", "rejected", "completion") if side in dataset.column_names]
        kept = [i for i, row in enumerate(dataset.select_columns(sides)) if not any(map(_is_blank, row.values()))]
        if len(kept) == len(dataset):
            return dataset
        self._drop(name, NO_ANSWER, len(dataset) - len(kept))
        if not kept:
            self.report(name)
        self._rows[name] = self._rows[name].selected(kept)
        return dataset.select(kept)

    def _differing(self, name: str, dataset: Any, args: Any) -> Any:
        """The rows of dpo without those whose answers are the same: their loss has no gradient."""
        if "rejected_ids" not in dataset.column_names:
            return dataset
        limit = args.max_length
        cut = slice(-limit, None) if limit and args.truncation_mode == "keep_end" else slice(None, limit)
        kept, same = [], 0
        for i, row in enumerate(dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])):
            chosen, rejected = ([*row["prompt_ids"], *row[side]] for side in ("chosen_ids", "rejected_ids"))
            same += chosen == rejected
            if chosen[cut] != rejected[cut]:
                kept.append(i)
        self._drop(name, SAME, same)
        self._drop(name, SAME_CUT, len(dataset) - len(kept) - same)
        return dataset if len(kept) == len(dataset) else dataset.select(kept)

    def _drop(self, name: str, reason: str, count: int) -> None:
        if count:
            self.dropped[name][reason] = self.dropped[name].get(reason, 0) + count
            self.size[name] -= count

    def _sft(self, name: str, dataset: Any, maker: SftRows, args: Any, *, packs: bool) -> Any:
        rows = self._rows[name]
        whole = None if packs else args.max_length
        limit = None if packs and args.packing_strategy != "bfd" else args.max_length  # the others cut no row short
        cut = slice(-whole, None) if whole and args.truncation_mode == "keep_end" else slice(None, whole)

        def tokens(row: dict[str, Any], i: int) -> dict[str, Any]:
            made = maker.tokens(row, lambda: rows.where(i))
            length = len(made["input_ids"])
            ids, labels = made["input_ids"][cut], made["labels"][cut]
            self._bounds.check(ids[:limit], lambda: rows.where(i))
            learns = any(label != MASKED for label in labels[1:])
            reason = NO_WEIGHT if row.get("weight") == 0 else NO_TOKENS if length < 2 else MASKED_AWAY
            return {
                "input_ids": ids,
                "labels": labels,
                "reason": "" if learns else reason,
                "length": length,
            }

        found = mapped(dataset, tokens, self._ctx, name="tokens", remove_columns=dataset.column_names)
        self.truncated[name] = sum(limit is not None and length > limit for length in found["length"])
        return self._without_dropped(name, found.remove_columns("length"))

    def _reward(self, name: str, dataset: Any, tokenizer: Any, max_length: int | None) -> Any:
        rows = self._rows[name]

        def tokens(row: dict[str, Any], i: int) -> dict[str, Any]:
            more = {}
            if isinstance(row["chosen"], list):
                more = templates.options(row)
                _check(tokenizer, row, lambda: rows.where(i))
            made = {
                f"{side}_ids": answer_ids(tokenizer, row.get("prompt"), row[side], lambda: rows.where(i), **more)
                for side in ("chosen", "rejected")
            }
            if max_length is not None and max(map(len, made.values())) > max_length:
                return {**made, "reason": TOO_LONG}
            for ids in made.values():
                self._bounds.check(ids, lambda: rows.where(i))
            return {**made, "reason": SAME if made["chosen_ids"] == made["rejected_ids"] else ""}

        unused = [column for column in dataset.column_names if column != "margin"]
        found = mapped(dataset, tokens, self._ctx, name="tokens", remove_columns=unused)
        return self._without_dropped(name, found)

    def _without_dropped(self, name: str, found: Any) -> Any:
        reasons = found["reason"][:]
        for reason in {*reasons} - {""}:
            self._drop(name, reason, reasons.count(reason))
        kept = found.remove_columns("reason").select([i for i, reason in enumerate(reasons) if not reason])
        if self.size[name] == 0:
            self.report(name)
        return kept


def _is_blank(answer: Any) -> bool:
    """Whether an answer is an empty text, or turns without content and tool calls."""
    if isinstance(answer, str):
        return not answer
    return not any(turn["content"] or turn.get("tool_calls") for turn in answer)


def _as_written(rows: Rows, dataset: Any, tokenizer: Any, ctx: Context) -> Any:
    """Check rows of dpo and kto, which TRL tokenizes, and remove duplicate begin tokens."""
    if isinstance(dataset[0]["prompt"], list):
        for i, row in enumerate(dataset):
            _check(tokenizer, row, lambda i=i: rows.where(i))  # type: ignore[misc]
        return dataset
    begin = tokenizer.bos_token
    if begin is None or not any(text.startswith(begin) for text in dataset["prompt"]):
        return dataset
    return mapped(
        dataset, lambda row, _: {"prompt": templates.without_begin(tokenizer, row["prompt"])}, ctx, name="begin"
    )


def _check(tokenizer: Any, row: dict[str, Any], where: templates.Where) -> None:
    prompt = row.get("prompt") or []
    for side in ("chosen", "rejected", "completion"):
        if side in row:
            chat = [*prompt, *row[side]]
            templates.check_keys(tokenizer, chat, row, where)
            templates.written(tokenizer, chat, where, tokenize=False, **templates.options(row))
