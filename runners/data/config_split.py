"""A configuration's name that is really a split's: `train_prefs` with the split `train[:512]`, as documents have it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import msgspec

from runners.api import Context


class Selection(Protocol):
    """A section that selects the rows of a dataset."""

    @property
    def name(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...


S = TypeVar("S", bound=Selection)

_TRAIN = re.compile(r"(?<![\w.-])train(?=$|[\[+(])")


def builder_of(ctx: Context, build: Callable[[str | None], Any], data: S, where: str) -> tuple[Any, S]:
    """The builder of a dataset, and the section with its split's name where a split's name was its configuration.

    Args:
        build: makes the builder of a configuration.

    Raises:
        ValueError: of `datasets`: there is neither such a configuration nor such a split.
    """
    try:
        return build(data.name), data
    except ValueError:
        if data.name is None:
            raise
        try:
            builder = build(None)
        except ValueError:  # several configurations
            builder = None
        if builder is None or (found := as_split(ctx, data, _splits(builder), where)) is None:
            raise
        return builder, found


def as_split(ctx: Context, data: S, splits: Iterable[str], where: str) -> S | None:
    """The section with `name` as its split, with the slice that its split has; None where `name` is no split.

    A split other than a part of `train` is no slice of another one.
    """
    split = data.split or "train"
    if data.name is None or data.name not in splits or not _TRAIN.match(split):
        return None
    found = _TRAIN.sub(data.name, split)
    ctx.log.warning("%s: %r is a split and no configuration; read as the split %r", where, data.name, found)
    return msgspec.structs.replace(data, name=None, split=found)  # type: ignore[type-var]  # it is a struct


def _splits(builder: Any) -> set[str]:
    return {str(name) for name in (*(builder.config.data_files or ()), *(builder.info.splits or ()))}
