"""Chooses the runtime adapter of each item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowmesh.validation.convert import nearest
from runners.api import BadRequest
from runners.models.adapters import LocalAdapter

BASE = "base"
FIELD = "adapter"


def ends_of(adapters: Sequence[LocalAdapter], name: str | None) -> tuple[int, ...]:
    """End tokens of the adapters that answer an item: those that are merged, and the runtime adapter `name`."""
    used = (adapter for adapter in adapters if adapter.apply == "merge" or adapter.name == name)
    return tuple(sorted({token_id for adapter in used for token_id in adapter.ends}))


def adapter_of(adapters: Sequence[LocalAdapter], metadata: dict[str, Any] | None, where: str) -> str | None:
    """The adapter's name for an item, or None for the base model.

    A single runtime adapter answers all items. With several, each item's metadata names one: `adapter: <name>` or
    `adapter: base`.

    Raises:
        BadRequest: there are several, and the item names none of them.
    """
    names = [adapter.name for adapter in adapters if adapter.apply == "runtime"]
    if len(names) <= 1:
        return names[0] if names else None
    wanted = (metadata or {}).get(FIELD)
    if wanted == BASE:
        return None
    if wanted in names:
        return str(wanted)
    hint = "is missing" if wanted is None else f"is {wanted!r}; {nearest(str(wanted), [*names, BASE])}"
    raise BadRequest(
        f"{where}: there are several runtime adapters ({', '.join(names)}), so its metadata has to name one as "
        f"{FIELD!r}, or {BASE!r}; it {hint}"
    )
