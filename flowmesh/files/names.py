"""Names that a task chose, as they can be shown."""

from __future__ import annotations

_MOST_CHARS = 200


def shown(name: str) -> str:
    """A name or path for a message: escaped where it is not printable, and shortened in the middle."""
    text = name if name.isprintable() else name.encode("unicode_escape", "surrogateescape").decode("ascii", "replace")
    half = _MOST_CHARS // 2
    return text if len(text) <= _MOST_CHARS else f"{text[:half]}…{text[-half:]}"
