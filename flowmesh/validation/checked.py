"""What a check of a document finds."""

from __future__ import annotations

import msgspec


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a check that runs nothing."""

    faults: tuple[str, ...] = ()
    """One line for each fault, which begins with the field's dotted path."""
    unused: tuple[str, ...] = ()
    """Paths of the fields that are accepted without effect."""
