"""A reward from a sequence classifier: its logit for a label, or positive minus negative probability."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from runners.api import BadRequest, Context
from runners.models import limits, weights
from runners.models.sources import loading, resolve_identifier
from runners.training import templates
from runners.training.data import Rows
from runners.training.reward_text import answer_ids, text_of
from runners.training.settings import RewardModel

BATCH = 32
NAMES = {"positive": ("positive", "pos", "label_1"), "negative": ("negative", "neg", "label_0")}
"""Label names of sentiment classifiers, in the order they are tried."""


class ModelReward:
    """Scores prompt and completion together. Keeps its model on `device`, frozen."""

    weight = 1.0

    def __init__(
        self,
        given: RewardModel,
        model: Any,
        tokenizer: Any,
        device: Any,
        warn: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self.name = given.identifier
        self._given = given
        self._model = model.to(device).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._device = device
        self._room = min(given.max_length, limits.positions(model) or given.max_length)
        labels = {str(name).lower(): int(index) for index, name in model.config.id2label.items()}
        self._positive, self._negative = labels_of(given, labels, model.config.num_labels, warn)

    @classmethod
    def load(cls, given: RewardModel, ctx: Context, device: Any) -> ModelReward:
        """
        Raises:
            BadRequest: there is no such model, it is no classifier, or it lacks a label that the task names.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        where = "spec.reward_model.identifier"
        source = resolve_identifier(ctx, given.identifier, given.revision, where)
        with loading(source):
            config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
            made_for = config.architectures or []
            if not any("SequenceClassification" in name for name in made_for):
                raise BadRequest(f"{where}: {source.shown!r} is no classifier but {', '.join(made_for) or 'unnamed'}")
            tokenizer = AutoTokenizer.from_pretrained(
                source.path, revision=source.revision, padding_side="right", trust_remote_code=False
            )
        model = weights.load_model(AutoModelForSequenceClassification, source, trust_remote_code=False)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return cls(given, model, tokenizer, device, ctx.log.warning)

    def check(self, rows: Rows) -> None:
        """Raises BadRequest where this model's chat template refuses a prompt; names the row."""
        for i, prompt in enumerate(rows.dataset["prompt"]):
            if isinstance(prompt, list):
                answer_ids(self._tokenizer, prompt, "", functools.partial(self._where, rows, i))

    def _where(self, rows: Rows, i: int) -> str:
        return f"spec.reward_model {self.name!r}: {rows.where(i)}"

    def score(self, prompts: list[Any], completions: list[str], _columns: dict[str, list[Any]]) -> list[float]:
        import torch

        rows = [self._ids(*pair) for pair in zip(prompts, completions, strict=True)]
        found: list[float] = []
        for start in range(0, len(rows), BATCH):
            padded = self._tokenizer.pad({"input_ids": rows[start : start + BATCH]}, return_tensors="pt")
            with torch.no_grad():
                logits = self._model(**padded.to(self._device)).logits.float()
            found += (self._given.scale * self._rate(logits)).tolist()
        return found

    def _rate(self, logits: Any) -> Any:
        if self._given.type == "sentiment":
            shares = logits.softmax(-1)
            return shares[:, self._positive] - shares[:, self._negative]
        rate = logits[:, self._positive]
        return rate if self._negative is None else rate - logits[:, self._negative]

    def _ids(self, prompt: Any, completion: str) -> list[int]:
        """Tokens as in a `reward` task, whose models have one output. Other classifiers read no end token."""
        if self._model.config.num_labels == 1 or (isinstance(prompt, list) and self._tokenizer.chat_template):
            found = answer_ids(self._tokenizer, prompt, completion, lambda: "spec.data.prompts")
        else:
            separator = "" if isinstance(prompt, str) else "\n"
            found = templates.text_ids(self._tokenizer, f"{text_of(prompt)}{separator}{completion}")
        if len(found) <= self._room:
            return found
        first = found[:1] if found[0] in self._tokenizer.all_special_ids else []
        return first + found[len(found) - self._room + len(first) :]  # keeps the completion


def labels_of(
    given: RewardModel, labels: dict[str, int], count: int, warn: Callable[[str], None]
) -> tuple[int, int | None]:
    """Indices of the positive and the negative output.

    Of two labels that the task does not name, the positive one is told by its name (`NAMES`), else it is the second
    one, as in sentiment classifiers.

    Args:
        labels: index by name, in lower case.
        warn: gets which label was taken.

    Raises:
        BadRequest: the model does not have a label that the task names, or there is no telling.
    """

    def find(name: str | None, field: str, default: tuple[str, ...]) -> int | None:
        wanted = (name.lower(),) if name else default
        for each in wanted:
            if each in labels:
                return labels[each]
        if name:
            raise BadRequest(f"spec.reward_model.{field}: no label {name!r}; the model has: {', '.join(labels)}")
        return None

    if given.type == "classification" and count == 1:
        if given.positive_label or given.negative_label:
            raise BadRequest("spec.reward_model.positive_label: the model has one output and no labels; leave it out")
        return 0, None
    sentiment = given.type == "sentiment"
    positive = find(given.positive_label, "positive_label", NAMES["positive"] if sentiment or count == 2 else ())
    negative = find(given.negative_label, "negative_label", NAMES["negative"] if sentiment else ())
    if count == 2 and positive is None:
        positive = 1 if negative is None else 1 - negative
    if count == 2 and negative is None and sentiment and positive is not None:
        negative = 1 - positive
    if positive is None or (sentiment and negative is None):
        field = "positive_label" if positive is None else "negative_label"
        raise BadRequest(f"spec.reward_model.{field}: missing; the model has: {', '.join(labels)}")
    name = next((label for label, index in labels.items() if index == positive), str(positive))
    if given.positive_label is None and not (sentiment and name in NAMES["positive"]):
        warn(f"spec.reward_model.positive_label: not given; {name!r} is taken, of: {', '.join(labels)}")
    return positive, negative
